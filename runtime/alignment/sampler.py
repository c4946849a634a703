"""The order of the pairs: a function of seed and epoch, so that a resumed training goes on where it was."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class LengthGrouped(Sampler[int]):
    """Every epoch another order, pairs of like length in one batch: little padding, and the same for every run.

    A batch is shared by `n_processes`: `batch_size` pairs each, one process behind the other. Where the last batch of
    an epoch has too few, each gets as many of them as the others (or one more), then places that hold no pair: the
    number of pairs stands for those.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, n_processes: int = 1) -> None:
        self.lengths, self.batch_size, self.seed, self.n_processes = lengths, batch_size, seed, n_processes
        self.epoch = 0  # set by the trainer

    def __len__(self) -> int:
        n_missing = -len(self.lengths) % (self.batch_size * self.n_processes)
        return len(self.lengths) + (n_missing if self.n_processes > 1 else 0)

    def __iter__(self) -> Iterator[int]:
        # Seeds of neighbouring runs must not share epochs.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.batch_size * self.n_processes
        window = 16 * size
        ordered: list[int] = []
        for start in range(0, len(order), window):
            ordered += sorted(order[start : start + window], key=lambda index: -self.lengths[index])
        batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        turns = torch.randperm(len(batches), generator=generator).tolist()
        # A short last batch stays last, or every later batch would be torn apart.
        turns.sort(key=lambda turn: len(batches[turn]) < size)
        return iter([index for turn in turns for index in self._shared(batches[turn])])

    def _shared(self, batch: list[int]) -> list[int]:
        if self.n_processes == 1 or len(batch) == self.batch_size * self.n_processes:
            return batch
        shares = [batch[process :: self.n_processes] for process in range(self.n_processes)]
        nothing = len(self.lengths)
        return [index for share in shares for index in [*share, *[nothing] * (self.batch_size - len(share))]]
