"""The order of the pairs: a function of seed and epoch, so that a resumed training goes on where it was."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class LengthGrouped(Sampler[int]):
    """Every epoch another order, pairs of like length in one batch: little padding, and the same for every run."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0  # set by the trainer

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # Seeds of neighbouring runs must not share epochs.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        window = 16 * self.batch_size
        ordered: list[int] = []
        for start in range(0, len(order), window):
            ordered += sorted(order[start : start + window], key=lambda index: -self.lengths[index])
        batches = [ordered[start : start + self.batch_size] for start in range(0, len(ordered), self.batch_size)]
        turns = torch.randperm(len(batches), generator=generator).tolist()
        # A short last batch stays last, or every later batch would be torn apart.
        turns.sort(key=lambda turn: len(batches[turn]) < self.batch_size)
        return iter([index for turn in turns for index in batches[turn]])
