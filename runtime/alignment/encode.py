"""Preference rows as token ids. What cannot be used is dropped with a reason; what is cut is marked; both are counted.

Only what the assistant says is an answer, its end token included. Template text behind the end token (often a line
end) is left out: nobody samples it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from transformers import PreTrainedTokenizerBase

from runtime.errors import InputError, TemplateError
from runtime.models import PromptFormat, encode_answer, encode_prompt
from runtime.records import Message

# drop: pairs above max_length. keep_end: cut the prompt's start. keep_start: cut the answers' ends.
Truncation = Literal["drop", "keep_end", "keep_start"]
Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """A prompt with a better and a worse answer; an answer is a text, or messages where tools or users speak too."""

    prompt_id: str
    group: str
    messages: tuple[Message, ...]
    chosen: str | tuple[Message, ...]
    rejected: str | tuple[Message, ...]
    score_margin: float | None = None


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Both conversations as token ids; the first `n_prompt` of each are the prompt.

    Spans are where the assistant speaks, [start, end); empty: everything behind the prompt. `row` is the pair's place
    among the rows it came from, `cut` what max_length took away.
    """

    group: str
    chosen: list[int]
    rejected: list[int]
    n_prompt: int
    score_margin: float | None = None
    prompt_id: str = ""
    row: int = 0
    chosen_spans: Spans = ()
    rejected_spans: Spans = ()
    cut: Literal["", "prompt", "answer"] = ""

    @property
    def length(self) -> int:
        """Tokens of the longer one."""
        return max(len(self.chosen), len(self.rejected))

    @property
    def n_answer(self) -> tuple[int, int]:
        """Answer tokens of chosen and rejected."""
        sides = ((self.chosen, self.chosen_spans), (self.rejected, self.rejected_spans))
        chosen, rejected = (sum(end - start for start, end in answer_spans(self, *side)) for side in sides)
        return chosen, rejected


def answer_spans(pair: EncodedPair, ids: Sequence[int], spans: Spans) -> Spans:
    """Where the assistant speaks in one of the two conversations."""
    return spans or ((pair.n_prompt, len(ids)),)


def encode_pairs(
    rows: Sequence[PreferenceRow],
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    max_length: int,
    truncation: Truncation = "drop",
) -> tuple[list[EncodedPair], Counter[str]]:
    """Encoded pairs, and how many rows were dropped for which reason (`cut_counts` counts the pairs that were cut).

    Reasons: empty_prompt, empty_answer, equal_answers, refused (by the chat template), prompt_not_a_prefix, and above
    max_length tokens prompt_too_long (it fills the context), too_long, answer_too_long (keep_end), equal_after_cut
    (keep_start). InputError when the template keeps no prompt as a prefix.
    """
    encoder = _Encoder(tokenizer, prompt_format, _end_ids(tokenizer))
    pairs: list[EncodedPair] = []
    dropped: Counter[str] = Counter()
    for number, row in enumerate(rows):
        try:
            pairs.append(_fit(encoder.pair(row, number), max_length, truncation))
        except _Dropped as reason:
            dropped[str(reason)] += 1
    if dropped.keys() == {"prompt_not_a_prefix"} and not pairs:
        raise InputError(
            f'the chat template of "{tokenizer.name_or_path}" renders the prompt differently once it is answered (all '
            f'{len(rows)} pairs); use a template whose generation prompt is a prefix, or set prompt_format = "text"'
        )
    return pairs, dropped


def cut_counts(pairs: Sequence[EncodedPair]) -> Counter[str]:
    """How many pairs lost the start of their prompt (prompt_cut) or the end of an answer (answer_cut)."""
    return Counter(f"{pair.cut}_cut" for pair in pairs if pair.cut)


class _Dropped(Exception):
    """The reason for which a row is not used."""


@dataclass(frozen=True, slots=True)
class _Encoder:
    tokenizer: PreTrainedTokenizerBase
    prompt_format: PromptFormat
    end_ids: frozenset[int]

    def pair(self, row: PreferenceRow, number: int) -> EncodedPair:
        """Both conversations, not yet cut; _Dropped for a row without two different answers."""
        chosen, rejected = _turns(row.chosen), _turns(row.rejected)
        if not all(map(_says_something, (chosen, rejected))):
            raise _Dropped("empty_answer")
        try:
            n_prompt = len(encode_prompt(self.tokenizer, row.messages, self.prompt_format))
            sides = [self._conversation(row.messages, answer) for answer in (chosen, rejected)]
        except TemplateError as error:
            raise _Dropped("prompt_not_a_prefix") from error
        except InputError as error:
            raise _Dropped("refused") from error
        (chosen_ids, chosen_spans), (rejected_ids, rejected_spans) = sides
        if n_prompt == 0:
            raise _Dropped("empty_prompt")
        if n_prompt in (len(chosen_ids), len(rejected_ids)):
            raise _Dropped("empty_answer")
        if chosen_ids == rejected_ids:
            raise _Dropped("equal_answers")
        origin = (row.score_margin, row.prompt_id, number)
        return EncodedPair(row.group, chosen_ids, rejected_ids, n_prompt, *origin, chosen_spans, rejected_spans)

    def _conversation(self, prompt: Sequence[Message], answer: Sequence[Message]) -> tuple[list[int], Spans]:
        """Token ids up to the last end token, and where the assistant speaks (nothing for a single message)."""
        if not _speaks(answer[0]) or not _speaks(answer[-1]):
            raise InputError("an answer starts and ends with a message of the assistant")
        found, n_prompt = encode_answer(self.tokenizer, prompt, answer, self.prompt_format)
        ids = self._ended(found, n_prompt)
        if len(answer) == 1:
            return ids, ()
        spans: list[tuple[int, int]] = []
        for place, turn in enumerate(answer):
            if _speaks(turn):
                start = encode_prompt(self.tokenizer, [*prompt, *answer[:place]], self.prompt_format)
                until, _ = encode_answer(self.tokenizer, prompt, answer[: place + 1], self.prompt_format)
                end = self._ended(until, len(start))
                if ids[: len(start)] != start or ids[: len(end)] != end:
                    raise TemplateError("the chat template renders earlier turns differently when others follow")
                spans.append((len(start), len(end)))
        return ids, tuple(spans)

    def _ended(self, ids: list[int], n_prompt: int) -> list[int]:
        """Without white space behind the end token; with the tokenizer's where the template writes none."""
        end = len(ids)
        while end > n_prompt and ids[end - 1] not in self.end_ids and _is_space(self.tokenizer, ids[end - 1]):
            end -= 1
        if end > n_prompt and ids[end - 1] in self.end_ids:
            return ids[:end]
        own = self.tokenizer.eos_token_id
        return ids if own is None else [*ids, cast(int, own)]


def _turns(answer: str | tuple[Message, ...]) -> tuple[Message, ...]:
    return (Message("assistant", answer),) if isinstance(answer, str) else answer


def _speaks(turn: Message) -> bool:
    return turn.role == "assistant"


def _says_something(answer: Sequence[Message]) -> bool:
    return len(answer) > 0 and all(turn.content.strip() for turn in answer if _speaks(turn))


def _is_space(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    return cast(str, tokenizer.decode([token_id])).isspace()


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """What may end a turn: special tokens, since templates often close turns with another than the tokenizer's own."""
    own = tokenizer.eos_token_id
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(special if own is None else special | {cast(int, own)})


def _fit(pair: EncodedPair, max_length: int, truncation: Truncation) -> EncodedPair:
    """The pair in at most max_length tokens; _Dropped where that cannot be."""
    over = pair.length - max_length
    if over <= 0:
        return pair
    if truncation == "keep_end":
        if over >= pair.n_prompt:
            raise _Dropped("answer_too_long")
        return _without_start(pair, over)
    if pair.n_prompt >= max_length:
        raise _Dropped("prompt_too_long")
    if truncation == "drop":
        raise _Dropped("too_long")
    return _without_end(pair, max_length)


def _without_start(pair: EncodedPair, n_cut: int) -> EncodedPair:
    def moved(spans: Spans) -> Spans:
        return tuple((start - n_cut, end - n_cut) for start, end in spans)

    return replace(
        pair,
        chosen=pair.chosen[n_cut:],
        rejected=pair.rejected[n_cut:],
        n_prompt=pair.n_prompt - n_cut,
        chosen_spans=moved(pair.chosen_spans),
        rejected_spans=moved(pair.rejected_spans),
        cut="prompt",
    )


def _without_end(pair: EncodedPair, max_length: int) -> EncodedPair:
    def kept(spans: Spans) -> Spans:
        return tuple((start, min(end, max_length)) for start, end in spans if start < max_length)

    chosen, rejected = pair.chosen[:max_length], pair.rejected[:max_length]
    if chosen == rejected:
        raise _Dropped("equal_after_cut")
    spans = kept(pair.chosen_spans), kept(pair.rejected_spans)
    return replace(pair, chosen=chosen, rejected=rejected, chosen_spans=spans[0], rejected_spans=spans[1], cut="answer")
