"""Batches of encoded pairs, padded on the right."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.alignment.encode import EncodedPair, PreferenceRow, Spans, answer_spans, encode_pairs

__all__ = ["Batch", "EncodedPair", "PreferenceRow", "collate", "encode_pairs", "moved", "padded"]


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


def collate(pairs: Sequence[EncodedPair], pad_id: int, with_rejected: bool) -> Batch:
    """A batch of pairs; for supervised training the chosen answers alone."""
    rows = [(pair.chosen, answer_spans(pair, pair.chosen, pair.chosen_spans)) for pair in pairs]
    if with_rejected:
        rows += [(pair.rejected, answer_spans(pair, pair.rejected, pair.rejected_spans)) for pair in pairs]
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    token_ids = padded([ids for ids, _ in rows], pad_id)
    is_answer = torch.zeros_like(token_ids, dtype=torch.bool)
    for row, (_, spans) in enumerate(rows):
        mark(is_answer[row], spans)
    return Batch(token_ids, (torch.arange(token_ids.shape[1])[None] < lengths[:, None]).long(), is_answer)


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; packed rows are not moved here."""
    assert batch.positions is None
    return Batch(batch.token_ids.to(device), batch.mask.to(device), batch.is_answer.to(device))


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """Some rows, no wider than they must be; rows is int64."""
    mask = batch.mask[rows]
    width = max(2, int(mask.sum(dim=1).max()))
    return Batch(batch.token_ids[rows, :width], mask[:, :width], batch.is_answer[rows, :width])


def padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """Rows of numbers, filled up on the right to the longest, as int64."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])


def mark(flags: Tensor, spans: Spans, offset: int = 0) -> None:
    """Set the flags (T,) of the spans, moved by `offset`."""
    for start, end in spans:
        flags[offset + start : offset + end] = True
