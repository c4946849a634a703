"""Processes that train one policy: prompts are divided, answers are shared, gradients are added up."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Item = TypeVar("Item")
Sliced = TypeVar("Sliced", Sequence[Any], Tensor)


class Ranks:
    """The processes of the default group of torch.distributed; one alone where none was started.

    Every process holds all answers of a step, so that means, baselines and whitening are those of the whole batch;
    what is divided is the work: decoding, scoring and the passes forward and backward.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0

    @property
    def is_first(self) -> bool:
        """Whether this one writes files."""
        return self.rank == 0

    def own(self, items: Sliced) -> Sliced:
        """This process's stretch of what is divided; stretches differ by one at most."""
        start, end = (len(items) * rank // self.size for rank in (self.rank, self.rank + 1))
        return items[start:end]

    def joined(self, own: Iterable[Item]) -> list[Item]:
        """All processes' stretches, one after the other."""
        if self.size == 1:
            return list(own)
        parts: list[list[Item]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, list(own))
        return [item for part in parts for item in part]

    def added(self, values: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def add_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        """Every process's; one that had no answer of an update adds nothing."""
        if self.size == 1:
            return
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad)

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()
