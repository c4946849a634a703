"""A transformers model that computes only the neurons which a bundle would: for measuring what that costs."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtime.edge.architectures import Activation
from runtime.edge.network import FfnLayer, activated, ffn_layers, shape_of
from runtime.edge.predictor import scores
from runtime.edge.records import LayerPredictor


@contextmanager
def sparse(model: PreTrainedModel, predictors: Sequence[LayerPredictor], thresholds: Sequence[float]) -> Iterator[None]:
    """Within, feed-forward layers leave out what is not predicted (kind gate: what is at most the threshold)."""
    activation = shape_of(model).activation
    with ExitStack() as stack:
        for layer, predictor, threshold in zip(ffn_layers(model), predictors, thresholds, strict=True):
            _replace(layer, predictor, threshold, activation, stack)
        yield


def _replace(
    layer: FfnLayer, predictor: LayerPredictor, threshold: float, activation: Activation, stack: ExitStack
) -> None:
    seen: list[Tensor] = []
    mlp = cast(Any, layer.mlp)

    def keep_residual(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[:] = [inputs[0]]

    def forward(inputs: Tensor) -> Tensor:
        value = activated(mlp.gate_proj(inputs), activation)
        if predictor.kind == "gate":
            is_kept = value.abs() > threshold
        else:
            is_kept = scores(predictor, seen.pop().float()) >= predictor.threshold
        found: Tensor = mlp.down_proj(torch.where(is_kept, value, 0) * mlp.up_proj(inputs))
        return found

    stack.callback(layer.norm.register_forward_pre_hook(keep_residual).remove)
    mlp.forward = forward
    stack.callback(mlp.__dict__.pop, "forward")
