"""The feed-forward layers of a bundle: what of them is in memory, which neurons are computed, and the hot ones.

What is computed, in which order and in blocks of which size, is decided by the bundle and the active neurons alone;
what happens to be in memory decides only when.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear, relu, silu

from runtime.edge.budget import DTYPES, Memory, RunSettings, staging_bytes
from runtime.edge.bundle import Bundle, value_dtype
from runtime.edge.cache import Indices, LayerCache
from runtime.edge.layout import aligned
from runtime.edge.quantise import dequantise
from runtime.edge.reader import Job, Reader, page_aligned
from runtime.edge.records import LayerPredictor, Matrix
from runtime.edge.store import Rows, Workspace, hot_matrices


@dataclass(slots=True)
class Layer:
    """One layer: what of it is resident, and its part of the cache."""

    n_hot: int
    cold_offset: int
    first_slot: int
    cache: LayerCache
    predictor: LayerPredictor
    gate: Matrix | None
    hot: dict[str, Matrix]
    pending: list[Job] = field(default_factory=list)
    missing: float = 0.0  # per token, of late
    ahead: "Future[None] | None" = None  # who decides what to read ahead

    @property
    def n_cold(self) -> int:
        """Neurons that are not hot."""
        return len(self.cache.slot_of)

    def catch_up(self) -> None:
        """Wait until what is read ahead is decided: then the cache is this thread's again."""
        if self.ahead is not None:
            ahead, self.ahead = self.ahead, None
            ahead.result()

    def holds(self, start: int, stop: int) -> bool:
        """Whether all of these cold neurons are in memory."""
        slots = self.cache.slot_of[start:stop]
        return bool((slots >= 0).all() and self.cache.is_whole[slots].all())


@dataclass(slots=True)
class Activity:
    """What decoding asked of the cache."""

    n_tokens: int = 0
    n_active: int = 0
    n_missing: int = 0
    n_prefetched: int = 0


class Layers:
    """All layers of one bundle."""

    def __init__(
        self,
        bundle: Bundle,
        resident: Mapping[str, Tensor],
        memory: Memory,
        settings: RunSettings,
        clock: Callable[[], float],
    ) -> None:
        manifest = bundle.manifest
        dtype = DTYPES[settings.dtype or manifest.dtype]
        self.manifest, self.settings, self.dtype = manifest, settings, dtype
        self.block, self.tick, self.activity = manifest.block, 0, Activity()
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.activation = relu if manifest.shape.activation == "relu" else silu
        stored = value_dtype(manifest)
        self.reader = Reader(bundle.neurons, manifest.record, settings.read, staging_bytes(manifest), clock)
        self.rows = Rows(sum(memory.slots), manifest.record, stored)
        self.workspace = Workspace(self.block, manifest.record, stored, dtype)
        self.layers = [self._layer(bundle, index, resident, memory.slots) for index in range(manifest.shape.n_layers)]

    def close(self) -> None:
        """End the reading threads."""
        self.reader.close()

    def active(self, layer: Layer, residual: Tensor, x: Tensor) -> tuple[Indices, Tensor | None]:
        """The cold neurons to compute, sorted; with resident gates also those of all neurons, (1, I)."""
        if layer.gate is None:
            return self.predicted(layer, residual), None
        gates = linear(x, dequantise(layer.gate, self.dtype))
        return self.mask(layer, residual, gates)[0].nonzero()[:, 0].numpy(), gates

    def predicted(self, layer: Layer, residual: Tensor) -> Indices:
        """The cold neurons to compute, sorted, by the predictor."""
        found: Indices = self.mask(layer, residual, None)[0].nonzero()[:, 0].numpy()
        return found

    def mask(self, layer: Layer, residual: Tensor, gates: Tensor | None) -> Tensor:
        """(T, cold), True where a neuron is computed."""
        predictor = layer.predictor
        if gates is None:
            return linear(relu(linear(residual, predictor.fc1)), predictor.fc2) >= predictor.threshold
        cold = self.activation(gates[:, layer.n_hot :])
        return (cold != 0) if predictor.threshold == 0 else cold.abs() > predictor.threshold

    def hot(self, layer: Layer, x: Tensor, gates: Tensor | None) -> Tensor:
        """The part of the hot neurons, (T, H)."""
        if layer.n_hot == 0:
            return torch.zeros(len(x), x.shape[1], dtype=self.wide)
        operands = {name: dequantise(matrix, self.dtype) for name, matrix in layer.hot.items()}
        gate = linear(x, operands["gate"]) if gates is None else gates[:, : layer.n_hot]
        return ((self.activation(gate) * linear(x, operands["up"])) @ operands["down"]).to(self.wide)

    def _layer(self, bundle: Bundle, index: int, resident: Mapping[str, Tensor], slots: tuple[int, ...]) -> Layer:
        manifest, found = self.manifest, self.manifest.layers[index]
        hot = page_aligned(aligned(found.n_hot * manifest.record.record_bytes))
        if found.n_hot:
            self.reader.wait(self.reader.read_range(found.hot_offset, hot.numpy()))
        gate: Matrix | None = None
        if found.predictor == "gate":
            gate = Matrix(
                resident[f"edge.{index}.gate"], resident.get(f"edge.{index}.gate_scales"), manifest.weight_format
            )
        predictor = bundle.predictor(index, resident)
        return Layer(
            n_hot=found.n_hot,
            cold_offset=found.cold_offset,
            first_slot=sum(slots[:index]),
            cache=LayerCache(manifest.n_cold(index), slots[index]),
            predictor=LayerPredictor(
                predictor.kind, predictor.fc1.to(self.dtype), predictor.fc2.to(self.dtype), predictor.threshold
            ),
            gate=gate,
            hot=hot_matrices(hot, found.n_hot, manifest.record, value_dtype(manifest)),
        )
