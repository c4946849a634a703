"""Log-probabilities of the reference, computed once before training: no second model is kept while it runs."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

from runtime.alignment.collate import Batch, EncodedPair, collate
from runtime.alignment.logps import answer_logps
from runtime.records import Progress

Logps = tuple[float, float]  # S of the chosen and of the rejected answer
Compute = Callable[[Sequence[EncodedPair]], list[Logps]]


class References(Protocol):
    """Where the log-probabilities of a split's pairs come from: a store, or `compute` where it has none."""

    def __call__(self, split: str, pairs: Sequence[EncodedPair], compute: Compute) -> list[Logps]:
        """One entry per pair, in their order."""
        ...


def not_stored(split: str, pairs: Sequence[EncodedPair], compute: Compute) -> list[Logps]:
    """References that are computed anew every time."""
    return compute(pairs)


@torch.no_grad()
def reference_logps(
    model: nn.Module, pairs: Sequence[EncodedPair], pad_id: int, batch_size: int, on_progress: Progress | None = None
) -> list[Logps]:
    """S of both answers of every pair, by the weights and adapters as they are now; the model keeps its mode.

    Pairs of like length share a batch, so that little is padding. Where both answers are one, it is computed once.
    """
    device = next(model.parameters()).device
    found: list[Logps] = [(0.0, 0.0)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda index: -pairs[index].length)
    was_training = model.training
    model.train(False)
    try:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            wanted = [pairs[place] for place in places]
            are_two = any(pair.chosen != pair.rejected for pair in wanted)
            batch = collate(wanted, pad_id, with_rejected=are_two)
            moved = Batch(batch.token_ids.to(device), batch.mask.to(device), batch.is_answer.to(device))
            logps = answer_logps(model, moved).logps.double().cpu()
            chosen, rejected = logps.chunk(2) if are_two else (logps, logps)
            for place, *both in zip(places, chosen.tolist(), rejected.tolist(), strict=True):
                found[place] = (both[0], both[1])
            if on_progress is not None:
                on_progress(start + len(places), len(order))
    finally:
        model.train(was_training)
    return found
