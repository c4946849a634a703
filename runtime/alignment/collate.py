"""Preference rows as token ids, and batches of them. A row that does not fit is dropped with a reason, never cut."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runtime.errors import InputError
from runtime.models import PromptFormat, encode_answer
from runtime.records import Message


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """A prompt with a better and a worse answer."""

    prompt_id: str
    group: str
    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    score_margin: float | None = None


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Both conversations as token ids; the first `n_prompt` of each are the prompt."""

    group: str
    chosen: list[int]
    rejected: list[int]
    n_prompt: int
    score_margin: float | None = None

    @property
    def length(self) -> int:
        """Tokens of the longer one."""
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded rows: all chosen answers, then (for pairs) all rejected ones in the same order.

    Packed rows hold several samples: `positions` start at 0 with each, `samples` number them over the whole batch.
    """

    token_ids: Tensor  # (rows, T) int64
    mask: Tensor  # (rows, T) int64, 0 on padding
    is_answer: Tensor  # (rows, T) bool
    positions: Tensor | None = None  # (rows, T) int64
    samples: Tensor | None = None  # (rows, T) int64
    n_samples: int = 0


def encode_pairs(
    rows: Sequence[PreferenceRow], tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, max_length: int
) -> tuple[list[EncodedPair], Counter[str]]:
    """Encoded pairs, and how many rows were dropped for which reason.

    Reasons: empty_answer, equal_answers, too_long (above max_length tokens), refused (by the chat template).
    """
    pairs: list[EncodedPair] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        if not row.chosen or not row.rejected:
            dropped["empty_answer"] += 1
            continue
        if row.chosen == row.rejected:
            dropped["equal_answers"] += 1
            continue
        try:
            chosen, n_prompt = encode_answer(tokenizer, row.messages, row.chosen, prompt_format)
            rejected, _ = encode_answer(tokenizer, row.messages, row.rejected, prompt_format)
        except InputError:
            dropped["refused"] += 1
            continue
        pair = EncodedPair(row.group, chosen, rejected, n_prompt, row.score_margin)
        if pair.length > max_length:
            dropped["too_long"] += 1
        else:
            pairs.append(pair)
    return pairs, dropped


def collate(pairs: Sequence[EncodedPair], pad_id: int, with_rejected: bool) -> Batch:
    """A batch of pairs; for supervised training the chosen answers alone."""
    answers = [pair.chosen for pair in pairs] + ([pair.rejected for pair in pairs] if with_rejected else [])
    n_prompts = [pair.n_prompt for pair in pairs] * (2 if with_rejected else 1)
    width = max(map(len, answers))
    token_ids = torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids in answers])
    place = torch.arange(width)[None]
    lengths = torch.tensor([len(ids) for ids in answers])[:, None]
    mask = place < lengths
    return Batch(token_ids, mask.long(), mask & (place >= torch.tensor(n_prompts)[:, None]))
