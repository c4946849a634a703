"""Partial answers scored by a model that keeps their keys and values: each cut costs the new tokens only.

The answers of one prompt share the prompt's keys. An answer is encoded anew each time, with the closing tokens of the
template; what it has in common with the ids that are stored stays, the rest is rolled back and fed again. So the
closing tokens of the last time disappear by themselves, and policy and reward model may have different tokenizers.
Scores equal those from scratch up to rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.errors import InputError
from runtime.kv.arena import Arena, ArenaSize, KVShape
from runtime.kv.attention import run
from runtime.kv.passes import PrefillPass, RowsPass
from runtime.models import LoadedModel
from runtime.records import Prompt
from runtime.rewards.protocol import Score

MAX_PASS_TOKENS = 4096  # bounds the activations of one pass

# (prompt, answer so far) -> ids of the whole conversation and how many of them are the prompt; InputError
Encode = Callable[[Prompt, str], tuple[list[int], int]]


@dataclass(slots=True)
class Fed:
    """What a pass computed for one answer: hidden states (fed tokens, width) of its last tokens."""

    row: "Row"
    hidden: Tensor
    n_stored: int  # tokens of the row that were there before


@dataclass(slots=True)
class Row:
    """One answer: its text, and the ids whose keys are stored."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)  # for readers that keep a number per token


# Turns what was computed into scores; may use and fill `row.values`.
Reader = Callable[[Sequence[Fed]], list[float]]


class IncrementalSession:
    """A RewardSession over a model on an arena of its own, which is as large as its answers are by now."""

    def __init__(self, loaded: LoadedModel, prompts: Sequence[Prompt], encode: Encode, reader: Reader, overlap: int):
        """overlap: how many tokens before the new ones the reader needs the hidden states of."""
        assert all(prompt.messages == prompts[0].messages for prompt in prompts), "a session has one prompt"
        self.loaded, self.prompt, self.encode, self.reader, self.overlap = loaded, prompts[0], encode, reader, overlap
        self.rows: dict[int, Row] = {}
        self.places: list[int] = []  # number of the answer in each row of the arena
        self.arena: Arena | None = None

    def extend(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]], texts: Sequence[str]) -> None:
        """See RewardSession."""
        for number, text in zip(rows, texts, strict=True):
            self.rows.setdefault(number, Row()).text = text

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """See RewardSession."""
        kept = set(rows)
        self.rows = {number: row for number, row in self.rows.items() if number in kept}
        leaving = [place for place, number in enumerate(self.places) if number not in kept]
        if self.arena is None or not leaving:
            return
        if len(leaving) == len(self.places):
            self.arena, self.places = None, []
            return
        moves = self.arena.release(leaving, self.arena.n_slots)
        for source, target in zip(moves.source, moves.target, strict=True):
            self.places[target] = self.places[source]
        del self.places[self.arena.n_rows :]

    @torch.inference_mode()
    def scores(self, rows: Sequence[int]) -> list[Score]:
        """See RewardSession."""
        scores: dict[int, Score] = {}
        wanted: dict[int, list[int]] = {}
        for number in rows:
            try:
                ids, n_prompt = self.encode(self.prompt, self.rows[number].text)
                wanted[number] = ids[n_prompt - self.overlap :]
            except InputError as error:
                scores[number] = Score(None, str(error))
        if wanted:
            if self.arena is None:
                self._open(ids[: n_prompt - self.overlap], list(wanted))
            for number, value in self._compute(wanted).items():
                scores[number] = Score.of(value)
        return [scores[number] for number in rows]

    def _open(self, prompt_ids: list[int], numbers: list[int]) -> None:
        """Compute the prompt, once."""
        model = self.loaded.model
        size = ArenaSize(1, len(prompt_ids), len(numbers), 1 + self.overlap)
        self.arena, self.places = Arena(KVShape.of(model), size, model.dtype, model.device), numbers
        self.arena.add(len(prompt_ids), len(numbers))
        token_ids = torch.tensor([prompt_ids], device=model.device)
        positions = torch.arange(len(prompt_ids), device=model.device)[None]
        run(model, token_ids, positions, PrefillPass(self.arena, slice(0, 1)))

    def _compute(self, wanted: dict[int, list[int]]) -> dict[int, float]:
        assert self.arena is not None
        late = [number for number in wanted if number not in self.places]
        assert not late, f"answers {late} were not among the first that were scored"
        longest = max(map(len, [*wanted.values(), *self._stored()]))
        self.arena.resize(len(self.places), 1 + longest)
        scores: dict[int, float] = {}
        step = max(1, MAX_PASS_TOKENS // longest)
        for start in range(0, len(self.places), step):
            places = range(start, min(start + step, len(self.places)))
            fed = self._feed(places, wanted)
            scores |= dict(zip(fed, self.reader(list(fed.values())), strict=True))
        return scores

    def _stored(self) -> list[list[int]]:
        return [self.rows[number].ids for number in self.places if number in self.rows]

    def _feed(self, places: range, wanted: dict[int, list[int]]) -> dict[int, Fed]:
        """Feed what is new of the answers in some rows of the arena."""
        assert self.arena is not None
        numbers = [self.places[place] for place in places]
        n_kept: list[int] = []
        new_ids: list[list[int]] = []
        for number in numbers:
            row = self.rows.get(number, Row())
            target = wanted.get(number, row.ids)
            n_common = _common_prefix(row.ids, target)
            # The reader needs at least the last token, and `overlap` tokens before the new ones.
            n = len(target) if number not in wanted else max(0, min(n_common, len(target) - 1) - self.overlap)
            n_kept.append(n)
            new_ids.append(target[n:])
        if not any(new_ids):
            return {}
        device = self.loaded.model.device
        rows = slice(places.start, places.stop)
        counts = torch.tensor([len(ids) for ids in new_ids], device=device)
        self.arena.row_tokens[rows] = torch.tensor(n_kept, device=device)
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids, dtype=torch.long) for ids in new_ids], True)
        arena_pass = RowsPass(self.arena, tokens.shape[1], self.arena.size.row_slots - 1, counts, rows)
        hidden = run(self.loaded.model, tokens.to(device), arena_pass.positions, arena_pass)
        self.arena.row_tokens[rows] += counts
        fed: dict[int, Fed] = {}
        for i, number in enumerate(numbers):
            if number in wanted:
                row = self.rows[number]
                row.ids = wanted[number]
                fed[number] = Fed(row, hidden[i, : len(new_ids[i])], n_kept[i])
        return fed


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
