"""Training for few active neurons: ReLU in place of SiLU, and a growing L1 penalty on what neurons put out.

After ProSparse (arXiv 2402.13516): the penalty's weight rises as half a cosine over the training, one stage of it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtime.alignment.items import Inputs, Item, Objective, Recall
from runtime.alignment.losses import Losses
from runtime.errors import ConfigError, ModelError

RISE = 0.75  # share of the training after which the penalty has its whole weight


@dataclass(frozen=True, slots=True)
class SparsitySettings:
    """relufy: exchange SiLU for ReLU first. weight: of the mean size of a neuron's output."""

    relufy: bool = False
    weight: float = 0.0

    def __post_init__(self) -> None:
        """ConfigError for what cannot work."""
        if not 0 <= self.weight < math.inf:
            raise ConfigError(f"sparsity_weight = {self.weight} must be 0 or above")

    @property
    def is_on(self) -> bool:
        """Whether anything is done."""
        return self.relufy or self.weight > 0


class SparseObjective:
    """Another objective with the penalty on top; `done` tells the share of the training that is over."""

    def __init__(self, inner: Objective, model: nn.Module, settings: SparsitySettings) -> None:
        self.inner, self.settings = inner, settings
        self.layers = gated_layers(model)
        self.done: Callable[[], float] = lambda: 0.0

    def prepare(self, model: nn.Module, items: Sequence[Item], batch_size: int, recall: Recall) -> list[Item]:
        """See Objective."""
        return self.inner.prepare(model, items, batch_size, recall)

    def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """See Objective."""
        return self.inner.collate(items)

    def losses(self, model: nn.Module, inputs: Inputs) -> Losses:
        """See Objective. Held-out losses are without the penalty, which would hide whether the model got better."""
        seen: list[tuple[Tensor, Tensor]] = []
        with self._seeing(inputs["mask"], seen):
            found = self.inner.losses(model, inputs)
        size = torch.stack([size for size, _ in seen]).mean()
        active = torch.stack([active for _, active in seen]).mean()
        ones = torch.ones_like(found.per_sample.detach())
        metrics = found.metrics | {"active": ones * active, "activation_l1": ones * size.detach()}
        weight = self.settings.weight * risen(self.done()) if model.training else 0.0
        return Losses(found.per_sample + weight * size, metrics)

    @contextmanager
    def _seeing(self, mask: Tensor, seen: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Mean size and share of active neurons of every layer, over real tokens."""

        def see(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            hidden = arguments[0]
            real = mask.to(hidden.dtype)[..., None] if hidden.shape[:2] == mask.shape else hidden.new_ones(1, 1, 1)
            count = real.expand(*hidden.shape[:2], 1).sum() * hidden.shape[-1]
            active = ((hidden.detach() != 0) * real).sum() / count
            seen.append(((hidden.abs() * real).sum() / count, active))

        handles = [layer.down_proj.register_forward_pre_hook(see) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def risen(done: float) -> float:
    """0 at the start, 1 from RISE on."""
    return (1 - math.cos(math.pi * min(done / RISE, 1.0))) / 2


def relufied(model: PreTrainedModel) -> None:
    """SiLU becomes ReLU, in place; ModelError for a model that has neither."""
    config = cast(Any, model.config)
    if config.hidden_act not in ("silu", "swish", "relu"):
        raise ModelError(f'relufy = true: hidden_act = "{config.hidden_act}" cannot be exchanged; silu can')
    for layer in gated_layers(model):
        layer.act_fn = nn.ReLU()
    config.hidden_act = "relu"


def gated_layers(model: nn.Module) -> list[Any]:
    """Modules with gate, up and down; ModelError where there are none."""
    found = [module for module in model.modules() if all(hasattr(module, f"{p}_proj") for p in ("gate", "up", "down"))]
    if not found:
        raise ModelError(f"{type(model).__name__} has no gated feed-forward layers; leave relufy and sparsity_weight")
    return found
