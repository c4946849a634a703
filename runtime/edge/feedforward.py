"""The feed-forward layers of a bundle: hot neurons dense, cold ones by prediction, their rows from cache or disk.

What is computed, in which order and in blocks of which size, is decided by the bundle and the active neurons alone;
what happens to be in memory decides only when.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear, relu, silu

from runtime.edge.budget import DTYPES, Memory, RunSettings, staging_bytes, stream_bytes
from runtime.edge.bundle import Bundle, value_dtype
from runtime.edge.cache import Indices, LayerCache
from runtime.edge.layout import ALIGN, aligned
from runtime.edge.quantise import dequantise
from runtime.edge.reader import Job, Reader, Target, page_aligned
from runtime.edge.records import LayerPredictor, Matrix
from runtime.edge.store import Rows, Workspace, hot_matrices

Block = tuple[int, int, NDArray[np.uint8] | None]  # first and last cold neuron, records if not in the cache
SHAPES = 8  # sizes of blocks that occur
RECENT = 64  # tokens of a prompt whose neurons stay in memory


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


class FeedForward:
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
        self.pad = max(8, self.block // SHAPES)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.activation = relu if manifest.shape.activation == "relu" else silu
        stored = value_dtype(manifest)
        self.reader = Reader(bundle.neurons, manifest.record, settings.read, staging_bytes(manifest), clock)
        self.rows = Rows(sum(memory.slots), manifest.record, stored)
        self.workspace = Workspace(self.block, manifest.record, stored, dtype)
        self.streams = [page_aligned(stream_bytes(manifest)) for _ in range(2)]
        self.layers = [self._layer(bundle, index, resident, memory.slots) for index in range(manifest.shape.n_layers)]

    def close(self) -> None:
        """End the reading threads."""
        self.reader.close()

    def decode(self, index: int, residual: Tensor, x: Tensor) -> Tensor:
        """(1, H) of one token: `residual` is what is predicted from, `x` its norm."""
        layer = self.layers[index]
        wanted, gates = self._active(layer, residual, x)
        self.activity.n_active += len(wanted)
        n_group = max(self.block, layer.cache.n_slots // self.block * self.block)
        total: Tensor | None = None
        for start in range(0, max(1, len(wanted)), n_group):
            group = wanted[start : start + n_group]
            slots, jobs = self._fetch(layer, group)
            if not self.settings.overlaps:
                self.reader.wait(jobs)
            if total is None:  # while the reads are under way
                total = self._hot(layer, x, gates)
            for part in self._blocks(layer, x, (group, slots, jobs), gates):
                total = total + part
        if not self.settings.keeps:
            layer.cache.forget()
        assert total is not None
        return total.to(self.dtype)

    def prefetch(self, index: int, residual: Tensor) -> None:
        """Start reading what layer `index` needs if its input is about `residual`."""
        layer = self.layers[index]
        if not self.settings.prefetch or layer.gate is not None or layer.cache.n_slots == layer.n_cold:
            return
        wanted = self._predicted(layer, residual)
        wanted = wanted[layer.cache.slot_of[wanted] < 0]
        if len(wanted) == 0 or len(wanted) > layer.cache.n_slots // 4:
            return
        self.tick += 1
        slots, _ = layer.cache.claim(wanted, self.tick)
        layer.cache.is_whole[slots] = True
        layer.pending += self._read(layer, wanted, slots, slice(0, len(self.manifest.record.matrices)))
        self.activity.n_prefetched += len(wanted)

    def stream(self, index: int, residual: Tensor, x: Tensor, is_sparse: bool) -> Tensor:
        """(T, H) of many tokens, the layer read from one end to the other.

        `is_sparse` leaves out the neurons that `decode` would leave out.
        """
        layer = self.layers[index]
        gates = None if layer.gate is None else linear(x, dequantise(layer.gate, self.dtype))
        keep = self._mask(layer, residual, gates) if is_sparse else None
        total = self._hot(layer, x, gates)
        self.reader.wait(layer.pending)
        layer.pending = []
        self.tick += 1
        for start, stop, records in self._streamed(layer):
            block = start, stop, records
            if gates is None:
                gate = linear(x, self._operand(layer, "gate", block))
            else:
                gate = gates[:, layer.n_hot + start : layer.n_hot + stop]
            act = self.activation(gate)
            if keep is not None:
                act = act * keep[:, start:stop]
            hidden = act * linear(x, self._operand(layer, "up", block))
            total = total + (hidden @ self._operand(layer, "down", block)).to(self.wide)
            if records is not None:
                self._retain(layer, start, records, act)
        return total.to(self.dtype)

    def _streamed(self, layer: Layer) -> Iterator[Block]:
        """(start, stop, records) of each block in order; None where its rows are in the cache."""
        stride = self.manifest.record.stride
        starts = list(range(0, layer.n_cold, self.block))
        ahead: list[Job] | None = None
        for turn, start in enumerate(starts):
            stop = min(start + self.block, layer.n_cold)
            jobs, ahead = ahead, None
            if jobs is None and not layer.holds(start, stop):
                jobs = self._read_block(layer, start, stop, turn)
            if turn + 1 < len(starts) and not layer.holds(stop, min(stop + self.block, layer.n_cold)):
                ahead = self._read_block(layer, stop, min(stop + self.block, layer.n_cold), turn + 1)
            if jobs is None:
                yield start, stop, None
            else:
                self.reader.wait(jobs)
                inside = (layer.cold_offset + start * stride) % ALIGN
                records = self.streams[turn % 2].numpy()[inside : inside + (stop - start) * stride]
                yield start, stop, records.reshape(-1, stride)

    def _read_block(self, layer: Layer, start: int, stop: int, turn: int) -> list[Job]:
        stride = self.manifest.record.stride
        first = (layer.cold_offset + start * stride) // ALIGN * ALIGN
        n_bytes = aligned(layer.cold_offset + stop * stride) - first
        return self.reader.read_range(first, self.streams[turn % 2].numpy()[:n_bytes])

    def _operand(self, layer: Layer, name: str, block: Block) -> Tensor:
        """A matrix of a block of neurons, (k, H)."""
        start, stop, records = block
        if records is not None:
            return self.workspace.from_records(records, name)
        slots = layer.cache.slot_of[start:stop].astype(np.int64) + layer.first_slot
        return self.workspace.from_rows(self.rows, name, torch.from_numpy(slots))

    def _retain(self, layer: Layer, start: int, records: NDArray[np.uint8], act: Tensor) -> None:
        """Keep the neurons of a block that the newest tokens used most: the answer goes on from there."""
        if not self.settings.keeps or layer.cache.n_slots == 0:
            return
        uses = (act[-RECENT:] != 0).sum(dim=0).numpy()
        quota = min(layer.cache.n_slots * len(records) // layer.n_cold, layer.cache.n_old(self.tick))
        chosen = np.argsort(-uses, kind="stable")[:quota]
        chosen = np.sort(chosen[uses[chosen] > 0])
        slots, missing = layer.cache.claim(start + chosen, self.tick)
        layer.cache.is_whole[slots] = True
        whole = slice(0, len(self.manifest.record.matrices))
        self.rows.put(slots[missing] + layer.first_slot, records, chosen[missing], whole)

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

    def _active(self, layer: Layer, residual: Tensor, x: Tensor) -> tuple[Indices, Tensor | None]:
        """The cold neurons to compute, sorted; with resident gates also those of all neurons, (1, I)."""
        if layer.gate is None:
            return self._predicted(layer, residual), None
        gates = linear(x, dequantise(layer.gate, self.dtype))
        return self._mask(layer, residual, gates)[0].nonzero()[:, 0].numpy(), gates

    def _predicted(self, layer: Layer, residual: Tensor) -> Indices:
        found: Indices = self._mask(layer, residual, None)[0].nonzero()[:, 0].numpy()
        return found

    def _mask(self, layer: Layer, residual: Tensor, gates: Tensor | None) -> Tensor:
        """(T, cold), True where a neuron is computed."""
        predictor = layer.predictor
        if gates is None:
            return linear(relu(linear(residual, predictor.fc1)), predictor.fc2) >= predictor.threshold
        cold = self.activation(gates[:, layer.n_hot :])
        return (cold != 0) if predictor.threshold == 0 else cold.abs() > predictor.threshold

    def _hot(self, layer: Layer, x: Tensor, gates: Tensor | None) -> Tensor:
        """The part of the hot neurons, (T, H)."""
        if layer.n_hot == 0:
            return torch.zeros(len(x), x.shape[1], dtype=self.wide)
        operands = {name: dequantise(matrix, self.dtype) for name, matrix in layer.hot.items()}
        gate = linear(x, operands["gate"]) if gates is None else gates[:, : layer.n_hot]
        return ((self.activation(gate) * linear(x, operands["up"])) @ operands["down"]).to(self.wide)

    def _fetch(self, layer: Layer, wanted: Indices) -> tuple[Indices, list[Job]]:
        """The slots of `wanted`, and the reads that bring what is not there yet."""
        self.tick += 1
        if layer.pending and not layer.cache.has_room(len(wanted)):
            self.reader.wait(layer.pending)  # or a slot could go to somebody else while it is being written
            layer.pending = []
        slots, missing = layer.cache.claim(wanted, self.tick)
        self.activity.n_missing += len(missing)
        whole = slice(0, len(self.manifest.record.matrices))
        part = slice(0, 1) if self._in_two_phases(layer) else whole
        layer.cache.is_whole[slots[missing]] = part == whole
        jobs = layer.pending + self._read(layer, wanted[missing], slots[missing], part)
        layer.pending = []
        return slots, jobs

    def _in_two_phases(self, layer: Layer) -> bool:
        return self.settings.two_phase and layer.gate is None

    def _read(self, layer: Layer, positions: Indices, slots: Indices, part: slice) -> list[Job]:
        parts = [slice(i, i + 1) for i in range(part.start, part.stop)] if self.settings.by_matrix else [part]
        return [
            job
            for one in parts
            for job in self.reader.read(Target(layer.cold_offset, self.rows, one), positions, slots + layer.first_slot)
        ]

    def _blocks(
        self, layer: Layer, x: Tensor, fetched: tuple[Indices, Indices, list[Job]], gates: Tensor | None
    ) -> list[Tensor]:
        """The part of each block of active neurons, those first whose rows are there."""
        wanted, slots, jobs = fetched
        starts = range(0, len(wanted), self.block)
        if self._in_two_phases(layer):
            return self._two_phases(layer, x, fetched)
        found: dict[int, Tensor] = {}
        left = list(starts)
        while left:
            ready = [start for start in left if all(job.future.done() for job in self._jobs_of(jobs, wanted, start))]
            start = (ready or left)[0]
            self.reader.wait(self._jobs_of(jobs, wanted, start))
            places = self._places(layer, slots, start)
            if gates is None:
                gate = linear(x, self.workspace.from_rows(self.rows, "gate", places))
            else:
                gate = gates[:, self._padded(wanted, start) + layer.n_hot]
            found[start] = self._finish(x, self._closed(self.activation(gate), len(wanted) - start), places)
            left.remove(start)
        self.reader.wait(jobs)  # reads ahead that nobody wanted in the end
        return [found[start] for start in starts]

    def _two_phases(self, layer: Layer, x: Tensor, fetched: tuple[Indices, Indices, list[Job]]) -> list[Tensor]:
        """As `_blocks`, but rows of up and down are read only where the gate is open."""
        wanted, slots, jobs = fetched
        self.reader.wait(jobs)
        acts: list[Tensor] = []
        for start in range(0, len(wanted), self.block):
            gate = linear(x, self.workspace.from_rows(self.rows, "gate", self._places(layer, slots, start)))
            acts.append(self._closed(self.activation(gate), len(wanted) - start))
        if not acts:
            return []
        is_open = (torch.cat(acts, dim=1)[0, : len(wanted)] != 0).numpy()
        needed = np.flatnonzero(is_open & ~layer.cache.is_whole[slots])
        layer.cache.is_whole[slots[needed]] = True
        part = slice(1, len(self.manifest.record.matrices))
        self.reader.wait(self._read(layer, wanted[needed], slots[needed], part))
        return [self._finish(x, act, self._places(layer, slots, index * self.block)) for index, act in enumerate(acts)]

    def _places(self, layer: Layer, slots: Indices, start: int) -> Tensor:
        """The rows of a block of active neurons in the store."""
        return self._padded(slots, start) + layer.first_slot

    def _padded(self, ids: Indices, start: int) -> Tensor:
        """A block of `ids`, the last one repeated up to a multiple of `pad`.

        The matrix library keeps a program per shape: with every number of rows they would be hundreds, of 200 KB each.
        """
        part = ids[start : start + self.block]
        n_padded = min(-(-len(part) // self.pad) * self.pad, self.block)
        return torch.from_numpy(np.concatenate([part, np.repeat(part[-1:], n_padded - len(part))]))

    def _closed(self, act: Tensor, n_real: int) -> Tensor:
        """Without what padding repeats."""
        act[:, n_real:] = 0
        return act

    def _finish(self, x: Tensor, act: Tensor, places: Tensor) -> Tensor:
        hidden = act * linear(x, self.workspace.from_rows(self.rows, "up", places))
        return (hidden @ self.workspace.from_rows(self.rows, "down", places)).to(self.wide)

    def _jobs_of(self, jobs: list[Job], wanted: Indices, start: int) -> list[Job]:
        first, last = wanted[start], wanted[min(start + self.block, len(wanted)) - 1]
        return [job for job in jobs if job.first <= last and job.last >= first]
