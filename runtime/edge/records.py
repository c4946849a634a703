"""The records of an edge export: what was measured of a model, what predicts it, where its neurons lie, and weights."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from runtime.edge.architectures import Activation

PredictorKind = Literal["low_rank", "mlp", "gate"]
WeightFormat = Literal["float32", "float16", "bfloat16", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class FfnShape:
    """The gated feed-forward layers of a model: activation(gate) * up, then down; `intermediate` neurons each."""

    n_layers: int
    hidden: int
    intermediate: int
    activation: Activation


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """How often the neurons of a layer are active, and which of them together.

    frequency: (I,) share of tokens. threshold: 0 for ReLU (active: gate > 0); SiLU: active when |silu(gate)| is above
    it (CATS, arXiv 2404.08763). active: (samples, ceil(I / 8)), numpy.packbits of a bounded sample of tokens.
    """

    frequency: NDArray[np.float32]
    threshold: float
    active: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Profile:
    """The activity of all layers over `n_tokens` tokens of calibration text."""

    shape: FfnShape
    layers: tuple[LayerProfile, ...]
    n_tokens: int


@dataclass(frozen=True, slots=True)
class LayerPredictor:
    """Which neurons of a layer will be active, with PowerInfer's semantics.

    score = fc2 @ relu(fc1 @ residual before the norm); a neuron is computed when score >= threshold. Kind `gate`
    predicts nothing: gate rows are resident and computed exactly. fc1: (r, H), fc2: (I, r), both float32.
    recall: share of active neurons that are predicted; predicted_active: share of neurons that are predicted.
    """

    kind: PredictorKind
    fc1: Tensor
    fc2: Tensor
    threshold: float = 0.0
    recall: float = 1.0
    predicted_active: float = 1.0


@dataclass(frozen=True, slots=True)
class LayerPlacement:
    """order: (I,) position -> neuron, the `n_hot` hot ones first, then the cold ones in their order on disk."""

    order: NDArray[np.int64]
    n_hot: int


@dataclass(frozen=True, slots=True)
class Matrix:
    """Weights, one row per neuron (down is transposed), as they are stored.

    values: (rows, cols) in the format; int4: uint8 (rows, cols / 2). scales: float16 (rows, cols / group) or None.
    """

    values: Tensor
    scales: Tensor | None
    format: WeightFormat
