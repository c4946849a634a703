"""Where the feed-forward layers of a transformers model are, and what flows through them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtime.edge.architectures import Activation, check_architecture
from runtime.edge.records import FfnShape
from runtime.errors import ModelError

# (layer, residual before the norm (tokens, H), gate (tokens, I))
Visit = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class FfnLayer:
    """A feed-forward layer, and the norm in front of it, whose input is the residual."""

    mlp: nn.Module
    norm: nn.Module

    def weight(self, part: str) -> Tensor:
        """Of gate, up or down, float32, one row per neuron."""
        found = cast(Tensor, getattr(self.mlp, f"{part}_proj").weight).detach().to(torch.float32)
        return found.T.contiguous() if part == "down" else found

    @property
    def norm_weight(self) -> Tensor:
        """(H,)."""
        return cast(Tensor, self.norm.weight).detach().to(torch.float32)


def shape_of(model: PreTrainedModel) -> FfnShape:
    """The shape of the feed-forward layers; ModelError for a model that has others than gated ones."""
    config = cast(Any, model.config)
    activation = check_architecture(config.model_type, config.hidden_act)
    layers = ffn_layers(model)
    if any(getattr(layers[0].mlp, f"{part}_proj").bias is not None for part in ("gate", "up", "down")):
        raise ModelError("the feed-forward layers have biases (mlp_bias), which a bundle does not have")
    return FfnShape(len(layers), config.hidden_size, config.intermediate_size, activation)


def ffn_layers(model: PreTrainedModel) -> list[FfnLayer]:
    """In the order of the model."""
    return [FfnLayer(layer.mlp, layer.post_attention_layernorm) for layer in cast(Any, model).model.layers]


def activated(gate: Tensor, activation: Activation) -> Tensor:
    """What `up` is multiplied with."""
    return torch.relu(gate) if activation == "relu" else nn.functional.silu(gate)


@contextmanager
def watched(model: PreTrainedModel, visit: Visit) -> Iterator[None]:
    """Every forward pass shows `visit` the residual and the gate of each layer; rows and positions are one axis."""
    with ExitStack() as stack:
        for index, layer in enumerate(ffn_layers(model)):
            for handle in _hooks(index, layer, visit):
                stack.callback(handle.remove)
        yield


def _hooks(index: int, layer: FfnLayer, visit: Visit) -> tuple[Any, Any]:
    seen: list[Tensor] = []

    def keep_residual(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[:] = [inputs[0].detach().flatten(0, -2)]

    def show(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        visit(index, seen.pop(), output.detach().flatten(0, -2))

    gate_proj = cast(nn.Module, layer.mlp.gate_proj)
    return layer.norm.register_forward_pre_hook(keep_residual), gate_proj.register_forward_hook(show)
