"""Pairs on their way through the trainer: as items, as batches of tensors, and under the model's wrappers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

from torch import Tensor, nn

from runtime.alignment.collate import Batch, EncodedPair
from runtime.alignment.losses import Losses
from runtime.alignment.reference import Compute, Logps

TENSORS = ("token_ids", "mask", "is_answer", "positions", "samples")  # of a Batch
FILLER = "filler"  # field of a batch that holds no pair of its own
Inputs = Mapping[str, Tensor]
Result = TypeVar("Result")


class Recall(Protocol):
    """Log-probabilities of the reference, stored or computed: References of one split."""

    def __call__(self, pairs: Sequence[EncodedPair], compute: Compute, of: str = "") -> list[Logps]:
        """One entry per pair; `of` tells other pairs of the split from its own."""
        ...


@dataclass(frozen=True, slots=True)
class Item:
    """A pair, its group's place among the names, and what was computed of it before training.

    A filler stands where a process has no pair left: it takes part in the passes, and counts nowhere.
    """

    pair: EncodedPair
    group_id: int
    reference: tuple[float, float] = (0.0, 0.0)  # S of both answers under the reference
    other: EncodedPair | None = None  # another pair's chosen answer under this pair's prompt
    other_reference: float = 0.0
    margin: float = 0.0
    is_filler: bool = False


class Objective(Protocol):
    """A method, as the trainer sees it."""

    def prepare(self, model: nn.Module, items: Sequence[Item], batch_size: int, recall: Recall) -> list[Item]:
        """The items with all that can be computed before training, by the weights it starts from, or recalled."""
        ...

    def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """A batch, `group_ids` among its fields."""
        ...

    def losses(self, model: nn.Module, inputs: Inputs) -> Losses:
        """Of each pair of a batch."""
        ...


def collated(objective: Objective, items: Sequence[Item]) -> dict[str, Tensor]:
    """A batch without fillers; one that has nothing else is marked, and has one pair that does not count."""
    counted = [item for item in items if not item.is_filler]
    batch = objective.collate(counted or items[:1])
    return batch if counted else batch | {FILLER: batch["group_ids"]}


def within(model: nn.Module, compute: Callable[[nn.Module], Result]) -> Result:
    """`compute` of the bare model, run as the forward pass of its wrappers: theirs are the gradients' reductions."""
    inner = model
    while hasattr(inner, "module"):
        inner = cast(nn.Module, inner.module)
    own = inner.__dict__.get("forward")

    def forward() -> Result:
        restore()
        return compute(inner)

    def restore() -> None:
        inner.__dict__.pop("forward", None)
        if own is not None:
            inner.__dict__["forward"] = own

    inner.__dict__["forward"] = forward
    try:
        return cast(Result, model())
    finally:
        restore()


def as_batch(inputs: Inputs, prefix: str = "") -> Batch:
    """The batch that `as_inputs` spread over fields."""
    parts = {name: inputs.get(f"{prefix}{name}") for name in TENSORS}
    n_samples = len(inputs["group_ids"]) if parts["samples"] is not None else 0
    return Batch(**parts, n_samples=n_samples)  # type: ignore[arg-type]


def as_inputs(batch: Batch, prefix: str = "") -> dict[str, Tensor]:
    """A batch as fields, for the Trainer to move."""
    parts = ((name, getattr(batch, name)) for name in TENSORS)
    return {f"{prefix}{name}": value for name, value in parts if value is not None}
