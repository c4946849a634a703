"""Which neurons will be active, told from the residual: low-rank copies of the gate without training, or a small MLP.

All have PowerInfer's form, fc2 @ relu(fc1 @ residual), without biases. RMSNorm divides by a positive number, so the
sign of a gate is that of W diag(norm) residual; relu([V; -V] x) carries V x, so any linear score fits the form.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from runtime.edge.network import FfnLayer, ffn_layers, shape_of
from runtime.edge.records import FfnShape, LayerPredictor, PredictorKind
from runtime.edge.residuals import Residuals, residuals
from runtime.edge.text import TokenBatch
from runtime.errors import ConfigError

Choice = Literal["auto", "low_rank", "mlp", "gate", "oracle"]
RANKS = (8, 16, 32, 64, 128, 256, 512)
# A predictor is good enough when it has so many neurons computed for every active one, or so many more of all.
WASTE, SLACK = 1.25, 0.02
LARGEST = 0.75  # size of a predictor, of the gate's
FEW = 50  # active tokens of a neuron from which no margin below zero is concluded
FITTED = 0.75  # share of the sampled tokens that is fitted to; recall is told from the rest
CHUNK = 1024  # neurons whose scores are looked at together


@dataclass(frozen=True, slots=True)
class PredictorSettings:
    """kind: auto is low_rank where it is smaller than the gate itself and good enough, else gate; oracle is exact.

    rank: 0 takes the smallest good enough. recall: share of active neurons that shall be predicted. n_samples: tokens
    it is calibrated on. steps: of training (mlp).
    """

    kind: Choice = "auto"
    rank: int = 0
    recall: float = 0.99
    n_samples: int = 4096
    steps: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        """ConfigError for what cannot work."""
        if not 0 < self.recall <= 1:
            raise ConfigError(f"recall = {self.recall} must be above 0 and at most 1")
        if self.n_samples < 32:
            raise ConfigError(f"n_samples = {self.n_samples} is too few to calibrate predictors; use at least 32")


def fit_predictors(
    model: PreTrainedModel,
    text: Sequence[TokenBatch],
    thresholds: Sequence[float],
    settings: PredictorSettings = PredictorSettings(),
) -> tuple[LayerPredictor, ...]:
    """A predictor for every layer. thresholds: of the layers' profiles."""
    shape = shape_of(model)
    if shape.activation == "silu" and settings.kind not in ("auto", "gate"):
        raise ConfigError(
            f'predictor = "{settings.kind}": which silu neurons are active is not told from the residual; '
            'use "gate", or fine-tune with relufy = true'
        )
    if settings.kind == "gate" or shape.activation == "silu":
        return tuple(gate_predictor(shape) for _ in range(shape.n_layers))
    seen = residuals(model, text, settings.n_samples, settings.seed)
    layers = zip(ffn_layers(model), seen, thresholds, strict=True)
    found = [_fitted(layer, known, threshold, settings) for layer, known, threshold in layers]
    predicted, active = sum(one.predicted_active for one, _ in found), sum(share for _, share in found)
    if settings.kind == "auto" and not _is_good(predicted / len(found), active / len(found)):
        return tuple(gate_predictor(shape) for _ in found)
    return tuple(predictor for predictor, _ in found)


def gate_predictor(shape: FfnShape) -> LayerPredictor:
    """Predicts nothing: gates are computed exactly."""
    return LayerPredictor("gate", torch.zeros(0, shape.hidden), torch.zeros(shape.intermediate, 0))


def oracle(layer: FfnLayer) -> LayerPredictor:
    """The gate itself in the form of a predictor: exact up to rounding."""
    weight = layer.weight("gate") * layer.norm_weight
    eye = torch.eye(weight.shape[1])
    return LayerPredictor("low_rank", torch.cat([eye, -eye]), torch.cat([weight, -weight], dim=1))


def low_rank(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """fc1 (2 r, H) and fc2 (I, 2 r): the best copy of `weight` (I, H) on inputs of second moment `moment` (H, H)."""
    values, vectors = torch.linalg.eigh(moment.double())
    root = values.clamp_min(float(values[-1]) * 1e-8).sqrt()
    spread = weight.double() @ (vectors * root)  # W C^(1/2) up to a rotation
    found, right = torch.linalg.eigh(spread.T @ spread)
    right = right[:, found.argsort(descending=True)[:rank]]
    down, up = (right.T / root) @ vectors.T, spread @ right
    # The rows of `down` have unlike lengths; of one length they weigh alike in the margin.
    length = down.norm(dim=1, keepdim=True)
    down, up = (down / length).float(), (up * length.T).float()
    return torch.cat([down, -down]), torch.cat([up, -up], dim=1)


def with_recall(fc1: Tensor, fc2: Tensor, inputs: Tensor, is_active: Tensor, recall: float) -> Tensor:
    """`fc2` with a margin per neuron, so that a share `recall` of its active tokens scores at least zero.

    Adding c to a whole row of fc2 adds c |relu(fc1 x)|_1 to its score: a bias that grows with the input, as scores do.
    """
    hidden = torch.relu(inputs @ fc1.T)
    ratio = (hidden @ fc2.T) / hidden.sum(dim=1, keepdim=True).clamp_min(1e-12)
    ranked = ratio.masked_fill(~is_active, torch.inf).sort(dim=0).values
    n_active = is_active.sum(dim=0)
    place = ((1 - recall) * n_active).floor().long().clamp_max(len(inputs) - 1)
    margin = -ranked.gather(0, place[None]).squeeze(0)
    margin = margin + 1e-4 * ratio.abs().mean(dim=0)  # the token at the quantile itself is above rounding
    margin = torch.where(n_active < FEW, margin.clamp_min(0), margin)
    return fc2 + torch.where(n_active == 0, 0.0, margin)[:, None]


def scores(predictor: LayerPredictor, residual: Tensor) -> Tensor:
    """(..., I) of a residual (..., H)."""
    return torch.relu(residual @ predictor.fc1.T) @ predictor.fc2.T


def figures(predictor: LayerPredictor, inputs: Tensor, is_active: Tensor) -> LayerPredictor:
    """The predictor with its recall and its share of predicted neurons on these inputs."""
    is_predicted = scores(predictor, inputs) >= predictor.threshold
    hits, n_active = int((is_predicted & is_active).sum()), int(is_active.sum())
    recall = hits / n_active if n_active else 1.0
    return replace(predictor, recall=recall, predicted_active=float(is_predicted.float().mean()))


def _fitted(
    layer: FfnLayer, seen: Residuals, threshold: float, settings: PredictorSettings
) -> tuple[LayerPredictor, float]:
    """The smallest good enough, else the largest there is; and the share of neurons that are active."""
    weight = layer.weight("gate") * layer.norm_weight
    is_active = seen.samples @ weight.T > threshold
    n_fitted = max(1, int(len(seen.samples) * FITTED))
    fitted, held_out = (seen.samples[:n_fitted], is_active[:n_fitted]), (seen.samples[n_fitted:], is_active[n_fitted:])
    share = float(held_out[1].float().mean())
    if settings.kind == "oracle":
        return figures(oracle(layer), *held_out), share
    for rank in _ranks(settings, weight.shape):
        fc1, fc2 = low_rank(weight, seen.moment, rank)
        if settings.kind == "mlp":
            from runtime.edge.predictor_training import trained

            fc1, fc2 = trained(fc1, fc2, fitted, settings.steps, settings.seed)
        fc2 = _margins(fc1, fc2, fitted, settings.recall)
        kind: PredictorKind = "mlp" if settings.kind == "mlp" else "low_rank"
        predictor = figures(LayerPredictor(kind, fc1, fc2), *held_out)
        if _is_good(predictor.predicted_active, share):
            break
    return predictor, share


def _is_good(predicted: float, active: float) -> bool:
    return predicted <= max(WASTE * active, active + SLACK)


def _margins(fc1: Tensor, fc2: Tensor, known: tuple[Tensor, Tensor], recall: float) -> Tensor:
    inputs, is_active = known
    parts = [slice(start, start + CHUNK) for start in range(0, len(fc2), CHUNK)]
    return torch.cat([with_recall(fc1, fc2[part], inputs, is_active[:, part], recall) for part in parts])


def _ranks(settings: PredictorSettings, shape: Sequence[int]) -> list[int]:
    """The asked one; else those with which a predictor is clearly smaller than the gate, and the smallest at least."""
    neurons, hidden = shape
    if settings.rank > hidden:
        raise ConfigError(f"rank = {settings.rank} is above hidden_size = {hidden}; take less, or predictor = oracle")
    if settings.rank:
        return [settings.rank]
    small = [rank for rank in RANKS if 2 * rank * (hidden + neurons) <= LARGEST * hidden * neurons]
    return small or [min(RANKS[0], hidden)]
