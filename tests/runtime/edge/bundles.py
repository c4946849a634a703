"""Small bundles of random models, with exact predictors, and activity that puts neurons in a new order."""

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from runtime.edge.bundle_write import Contents, write_bundle
from runtime.edge.network import ffn_layers, shape_of
from runtime.edge.placement import place
from runtime.edge.records import LayerPlacement, LayerPredictor, LayerProfile, Profile, WeightFormat
from tests.runtime.edge.models import gated_model


def exact_predictor(layer_weight: torch.Tensor, norm: torch.Tensor) -> LayerPredictor:
    """sign(gate . norm(r)) = sign((gate * norm) . r), in the form fc2 @ relu(fc1 @ r)."""
    u, s, v = torch.linalg.svd(layer_weight * norm, full_matrices=False)
    return LayerPredictor("low_rank", torch.cat([v, -v]), torch.cat([u * s, -u * s], dim=1))


def gate_predictor(model: PreTrainedModel) -> LayerPredictor:
    """No prediction: gates are resident."""
    return LayerPredictor("gate", torch.empty(0, model.config.hidden_size), torch.empty(0, 0))


def profile(model: PreTrainedModel, threshold: float = 0.0, seed: int = 0) -> Profile:
    """Made up: frequencies from 0 to 1 in random order."""
    shape, rng = shape_of(model), np.random.default_rng(seed)
    layers = []
    for _ in range(shape.n_layers):
        active = rng.random((64, shape.intermediate)) < rng.random(shape.intermediate)
        layers.append(LayerProfile(active.mean(0).astype(np.float32), threshold, np.packbits(active, axis=1)))
    return Profile(shape, tuple(layers), 64)


def contents(
    model: PreTrainedModel,
    weight_format: WeightFormat = "float32",
    placements: tuple[LayerPlacement, ...] | None = None,
    tokenizer: Path | None = None,
    threshold: float = 0.0,
) -> Contents:
    """Exact predictors for ReLU, resident gates for SiLU."""
    found = profile(model, threshold)
    if found.shape.activation == "silu":
        predictors = [gate_predictor(model)] * found.shape.n_layers
    else:
        predictors = [exact_predictor(layer.weight("gate"), layer.norm_weight) for layer in ffn_layers(model)]
    placed = placements or place(found, hot_frequency=0.8)
    return Contents(model, found, predictors, placed, tokenizer, weight_format, 16)


def written(folder: Path, weight_format: WeightFormat = "float32", activation: str = "relu") -> Path:
    """The folder of a new bundle."""
    write_bundle(folder, contents(gated_model(activation=activation), weight_format, threshold=0.05))
    return folder
