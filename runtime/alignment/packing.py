"""Several short samples in one row, for supervised training: each attends to itself alone, as if it had its own row.

transformers keeps them apart by their positions, which start at 0 with each sample. Losses are those of unpacked rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from runtime.alignment.collate import Batch, mark, padded
from runtime.alignment.encode import EncodedPair, answer_spans
from runtime.alignment.logps import unwrapped
from runtime.errors import ModelError


def packs(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The samples (by their place) that share a row of at most `capacity` tokens, each sample in one row.

    First fit, longest first; a row's samples keep their order, and rows are in the order of their first samples.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        row = next((number for number, left in enumerate(free) if left >= lengths[place]), None)
        if row is None:
            rows.append([])
            free.append(max(capacity, lengths[place]))
            row = len(rows) - 1
        rows[row].append(place)
        free[row] -= lengths[place]
    return sorted(sorted(row) for row in rows)


def collate_packed(rows: Sequence[Sequence[EncodedPair]], pad_id: int) -> Batch:
    """A batch of rows of chosen answers; samples are numbered row by row."""
    token_ids = padded([[token for pair in row for token in pair.chosen] for row in rows], pad_id)
    positions, mask, samples = (torch.zeros_like(token_ids) for _ in range(3))
    is_answer = torch.zeros_like(token_ids, dtype=torch.bool)
    number = 0
    for place, row in enumerate(rows):
        start = 0
        for pair in row:
            end = start + len(pair.chosen)
            positions[place, start:end] = torch.arange(end - start)
            samples[place, start:end] = number
            mark(is_answer[place], answer_spans(pair, pair.chosen, pair.chosen_spans), start)
            start, number = end, number + 1
        mask[place, :start] = 1
        # The padding is one more sample, so that positions always grow by one or start again.
        positions[place, start:] = torch.arange(positions.shape[1] - start)
    return Batch(token_ids, mask, is_answer, positions, samples, number)


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """ModelError for a model in which a sample sees what is packed in front of it (some keep a running state)."""
    inner = unwrapped(model)
    n_vocabulary = int(inner.config.get_text_config().vocab_size)
    samples = [[n_vocabulary // 3] * 4, [n_vocabulary // 2, n_vocabulary // 5, n_vocabulary // 2]]
    was_training = inner.training
    inner.train(False)
    try:
        alone = _logits(inner, [samples[1]])
        together = _logits(inner, samples)[-len(samples[1]) :]
    finally:
        inner.train(was_training)
    tolerance = 1e-3 if inner.dtype in (torch.float32, torch.float64) else 5e-2  # of the largest logit
    if not torch.allclose(alone, together, rtol=tolerance, atol=tolerance * float(alone.abs().max())):
        raise ModelError(f"{type(inner).__name__} mixes samples that are packed in one row; train it without packing")


def _logits(model: nn.Module, samples: Sequence[Sequence[int]]) -> Tensor:
    device = next(model.parameters()).device
    token_ids = torch.tensor([[token for sample in samples for token in sample]], device=device)
    positions = torch.cat([torch.arange(len(sample), device=device) for sample in samples])[None]
    logits: Tensor = model(input_ids=token_ids, position_ids=positions, use_cache=False).logits[0]
    return logits.float()
