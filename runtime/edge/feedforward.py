"""The feed-forward layers of a bundle: what of them is in memory, which neurons are computed, and the hot ones.

What is computed, in which order and in blocks of which size, is decided by the bundle and the active neurons alone;
what happens to be in memory decides only when.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear, relu, silu

from runtime.edge.budget import DTYPES, Memory, RunSettings, block_of, staging_bytes
from runtime.edge.bundle import Bundle, value_dtype
from runtime.edge.cache import Indices, LayerCache
from runtime.edge.layout import aligned
from runtime.edge.native import Kernels
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
    is_mirrored: bool  # fc1 is [V; -V]
    gate: Matrix | None  # of all neurons, where it is resident
    hot: dict[str, Matrix]
    pending: list[Job] = field(default_factory=list)
    waited_s: float = 0.0  # for reads, per token, of late, where nothing was read ahead
    is_ahead: bool = False

    @property
    def n_cold(self) -> int:
        """Neurons that are not hot."""
        return len(self.cache.slot_of)

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
        kernels: Kernels | None = None,
    ) -> None:
        manifest = bundle.manifest
        dtype = DTYPES[settings.dtype or manifest.dtype]
        self.manifest, self.settings, self.dtype = manifest, settings, dtype
        self.block, self.tick, self.activity = block_of(manifest), 0, Activity()
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.activation = relu if manifest.shape.activation == "relu" else silu
        stored = value_dtype(manifest)
        self.reader = Reader(bundle.neurons, manifest.record, settings.read, staging_bytes(manifest), clock)
        self.rows = Rows(sum(memory.slots), manifest.record, stored, kernels)
        self.workspace = Workspace(self.block, manifest.record, stored, dtype, kernels)
        self.kernels, self.places = kernels, torch.arange(max(one.n_hot for one in manifest.layers))
        self.factor = self.workspace.dtype
        self.whole = slice(0, len(manifest.record.matrices))  # all matrices of a neuron
        self.layers = [self._layer(bundle, index, resident, memory.slots) for index in range(manifest.shape.n_layers)]

    def close(self) -> None:
        """End the reading threads."""
        self.reader.close()

    def active(self, layer: Layer, residual: Tensor, x: Tensor) -> tuple[Indices, Tensor | None]:
        """The cold neurons to compute, sorted; with resident gates also those of all neurons, (1, I).

        `x`, here and below, is in the type that is multiplied in, `factor`.
        """
        if layer.gate is None:
            return self.predicted(layer, residual), None
        if self.kernels is not None:
            gates = self.kernels.times(x, layer.gate)
        else:
            gates = torch.empty(len(x), self.manifest.shape.intermediate, dtype=self.factor)
            for rows in self.blocks(self.manifest.shape.intermediate):
                gates[:, rows] = self.workspace.times(x, layer.gate, rows)
        is_open = self.is_open(layer, self.activation(gates[:, layer.n_hot :]))
        return is_open[0].nonzero()[:, 0].numpy(), gates

    def predicted(self, layer: Layer, residual: Tensor) -> Indices:
        """The cold neurons to compute, sorted, by the predictor."""
        if self.kernels is not None:
            return self.kernels.predicted(residual, layer.predictor, layer.is_mirrored)
        is_predicted = self.is_predicted(layer, self.code(layer, residual), slice(None))
        found: Indices = is_predicted[0].nonzero()[:, 0].numpy()
        return found

    def code(self, layer: Layer, residual: Tensor) -> Tensor:
        """(T, r): relu(fc1 @ residual), what the predictor goes on from."""
        return relu(linear(residual, layer.predictor.fc1))

    def is_predicted(self, layer: Layer, code: Tensor, rows: slice) -> Tensor:
        """(T, rows), True where a cold neuron is computed, by its `code`."""
        return linear(code, layer.predictor.fc2[rows]) >= layer.predictor.threshold

    def is_open(self, layer: Layer, act: Tensor) -> Tensor:
        """True where a cold neuron is computed, by its activation."""
        threshold = layer.predictor.threshold
        return (act != 0) if threshold == 0 else act.abs() > threshold

    def hot(self, layer: Layer, x: Tensor, gates: Tensor | None) -> Tensor:
        """The part of the hot neurons, (T, H)."""
        if self.kernels is not None and len(x) == 1:
            act = None if gates is None else self.activation(gates[:, : layer.n_hot])
            return self.neurons(x, layer.hot, self.places[: layer.n_hot], act)
        total = torch.zeros(len(x), x.shape[1], dtype=self.wide)
        for rows in self.blocks(layer.n_hot):
            gate = self.workspace.times(x, layer.hot["gate"], rows) if gates is None else gates[:, rows]
            hidden = self.activation(gate) * self.workspace.times(x, layer.hot["up"], rows)
            total += self.workspace.mixed(hidden, layer.hot["down"], rows).to(self.wide)
        return total

    def neurons(self, x: Tensor, rows: Mapping[str, Matrix], places: Tensor, act: Tensor | None) -> Tensor:
        """(1, H) of one token, by the kernels: what the neurons `places` put out; `act` where that is known."""
        assert self.kernels is not None
        if act is None and self.activation is relu:
            return self.kernels.relu_neurons(x, rows["gate"], rows["up"], rows["down"], places)
        if act is None:
            act = self.activation(self.kernels.times(x, rows["gate"], places))
        return self.kernels.finished(x, act, rows["up"], rows["down"], places)

    def blocks(self, n: int) -> Iterator[slice]:
        """0 to `n` in blocks of neurons: no more than one is ever widened."""
        return (slice(start, min(start + self.block, n)) for start in range(0, n, self.block))

    def _layer(self, bundle: Bundle, index: int, resident: Mapping[str, Tensor], slots: tuple[int, ...]) -> Layer:
        manifest, found = self.manifest, self.manifest.layers[index]
        hot = page_aligned(aligned(found.n_hot * manifest.record.record_bytes))
        if found.n_hot:
            self.reader.wait(self.reader.read_range(found.hot_offset, hot.numpy()))
        matrices = hot_matrices(hot, found.n_hot, manifest.record, value_dtype(manifest))
        gate: Matrix | None = None
        if found.predictor == "gate":
            gate = Matrix(
                resident[f"edge.{index}.gate"], resident.get(f"edge.{index}.gate_scales"), manifest.weight_format
            )
            matrices["gate"] = gate  # its first rows
        predictor = bundle.predictor(index, resident)
        half = len(predictor.fc1) // 2
        return Layer(
            n_hot=found.n_hot,
            cold_offset=found.cold_offset,
            first_slot=sum(slots[:index]),
            cache=LayerCache(manifest.n_cold(index), slots[index]),
            predictor=predictor,
            is_mirrored=half > 0 and torch.equal(predictor.fc1[:half], -predictor.fc1[half:]),
            gate=gate,
            hot=matrices,
        )
