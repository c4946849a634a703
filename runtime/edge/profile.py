"""How often neurons are active over calibration text, and which together; memory does not grow with the text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from runtime.edge.network import activated, shape_of, watched
from runtime.edge.records import FfnShape, LayerProfile, Profile
from runtime.edge.text import TokenBatch

# Histogram of log10 |silu(gate)|: 0.0045 apart, so a threshold is known within 1 %.
LOWEST, HIGHEST, N_BINS = -7.0, 2.0, 2000


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """sparsity: share of a SiLU layer's activations below its threshold (ReLU has its own). n_samples: tokens whose
    whole pattern of activity is kept, for co-activation.
    """

    sparsity: float = 0.5
    n_samples: int = 2048
    seed: int = 0


def profile(
    model: PreTrainedModel, text: Sequence[TokenBatch], settings: ProfileSettings = ProfileSettings()
) -> Profile:
    """Frequencies, thresholds and a sample of patterns of every layer. SiLU models are read twice."""
    shape = shape_of(model)
    thresholds = [0.0] * shape.n_layers
    if shape.activation == "silu":
        thresholds = cats_thresholds(model, text, settings.sparsity)
    n_tokens = sum(int(batch.mask.sum()) for batch in text)
    counter = _Counter(shape, thresholds, sampled(n_tokens, settings.n_samples, settings.seed))
    read(model, text, counter.add)
    return Profile(shape, counter.layers(n_tokens), n_tokens)


def cats_thresholds(model: PreTrainedModel, text: Sequence[TokenBatch], sparsity: float) -> list[float]:
    """Per layer, the size of silu(gate) that a share `sparsity` of all activations stays below (CATS, eq. 3)."""
    shape = shape_of(model)
    counts = torch.zeros(shape.n_layers, N_BINS, dtype=torch.float64)

    def add(index: int, residual: Tensor, gate: Tensor) -> None:
        sizes = activated(gate, shape.activation).abs().float().clamp_min(10**LOWEST).log10()
        counts[index] += torch.histc(sizes.clamp_max(HIGHEST), N_BINS, LOWEST, HIGHEST).double().cpu()

    read(model, text, add)
    below = counts.cumsum(dim=1) / counts.sum(dim=1, keepdim=True)
    edges = torch.linspace(LOWEST, HIGHEST, N_BINS + 1, dtype=torch.float64)[1:]
    places = (below < sparsity).sum(dim=1).clamp_max(N_BINS - 1)
    return [float(10 ** edges[place]) for place in places] if sparsity else [0.0] * shape.n_layers


class _Counter:
    """Sums of activity per neuron, and the patterns of the sampled tokens."""

    def __init__(self, shape: FfnShape, thresholds: Sequence[float], sampled: NDArray[np.int64]) -> None:
        self.shape, self.thresholds, self.sampled = shape, thresholds, sampled
        self.counts = torch.zeros(shape.n_layers, shape.intermediate, dtype=torch.int64)
        self.patterns: list[list[NDArray[np.uint8]]] = [[] for _ in range(shape.n_layers)]
        self.n_seen = [0] * shape.n_layers

    def add(self, index: int, residual: Tensor, gate: Tensor) -> None:
        """Tokens of a layer, in the order of the text."""
        is_active = activated(gate, self.shape.activation).abs() > self.thresholds[index]
        self.counts[index] += is_active.sum(dim=0).cpu()
        start, end = self.n_seen[index], self.n_seen[index] + len(gate)
        chosen = self.sampled[np.searchsorted(self.sampled, start) : np.searchsorted(self.sampled, end)] - start
        self.patterns[index].append(np.packbits(is_active[torch.from_numpy(chosen)].cpu().numpy(), axis=1))
        self.n_seen[index] = end

    def layers(self, n_tokens: int) -> tuple[LayerProfile, ...]:
        """What was counted."""
        shares = (self.counts.double() / n_tokens).float().numpy()
        packed = [np.concatenate(parts) for parts in self.patterns]
        return tuple(LayerProfile(*parts) for parts in zip(shares, self.thresholds, packed, strict=True))


def sampled(n_tokens: int, n_samples: int, seed: int) -> NDArray[np.int64]:
    """Places of the tokens that are kept, the same for all layers, in rising order."""
    chosen = np.random.default_rng(seed).choice(n_tokens, min(n_samples, n_tokens), replace=False)
    return np.sort(chosen).astype(np.int64)


@torch.inference_mode()
def read(model: PreTrainedModel, text: Sequence[TokenBatch], visit: Callable[[int, Tensor, Tensor], None]) -> None:
    """One pass; `visit` gets real tokens alone."""
    mask = torch.empty(0)

    def without_padding(index: int, residual: Tensor, gate: Tensor) -> None:
        visit(index, residual[mask], gate[mask])

    with watched(model, without_padding):
        for batch in text:
            mask = batch.mask.flatten().to(model.device)
            model.model(input_ids=batch.token_ids.to(model.device), use_cache=False)
