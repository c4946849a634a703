"""One token through the feed-forward layers: only the neurons that are active, in blocks, while others are read."""

import numpy as np
import torch
from torch import Tensor

from runtime.edge.cache import Indices
from runtime.edge.feedforward import Layer, Layers
from runtime.edge.reader import Job, Target

SHAPES = 8  # sizes of blocks that occur
RECENCY = 0.1  # weight of the newest token in an average
RETRY = 32  # tokens after which no layer is looked ahead at once, to see what waiting costs


class Decoding:
    """The sparse way through `ffn`."""

    def __init__(self, ffn: Layers) -> None:
        self.ffn = ffn
        self.pad = max(8, ffn.block // SHAPES) if ffn.kernels is None else 1
        self.look_s = 0.0  # what looking ahead costs, per layer

    def decode(self, index: int, residual: Tensor, x: Tensor) -> Tensor:
        """(1, H) of one token: `residual` is what is predicted from, `x` its norm."""
        layer, x = self.ffn.layers[index], x.to(self.ffn.factor)
        waited_s = self.ffn.reader.counters.wait_s
        wanted, gates = self.ffn.active(layer, residual, x)
        self.ffn.activity.n_active += len(wanted)
        n_group = max(self.ffn.block, layer.cache.n_slots // self.ffn.block * self.ffn.block)
        total: Tensor | None = None
        for start in range(0, max(1, len(wanted)), n_group):
            group = wanted[start : start + n_group]
            slots, jobs = self._fetch(layer, group)
            if not self.ffn.settings.overlaps:
                self.ffn.reader.wait(jobs)
            if total is None:  # while the reads are under way
                total = self.ffn.hot(layer, x, gates)
            for part in self._blocks(layer, x, (group, slots, jobs), gates):
                total = total + part
        if not layer.is_ahead:
            layer.waited_s += RECENCY * (self.ffn.reader.counters.wait_s - waited_s - layer.waited_s)
        if not self.ffn.settings.keeps:
            layer.cache.forget()
        assert total is not None
        return total.to(self.ffn.dtype)

    def prefetch(self, index: int, residual: Tensor) -> None:
        """Start reading what layer `index` needs if its input is about `residual`."""
        layer, started = self.ffn.layers[index], self.ffn.reader.clock()
        # Predicting twice is worth its time where reads take longer than what is computed meanwhile.
        is_worth_it = layer.waited_s > self.look_s and self.ffn.activity.n_tokens % RETRY != 0
        layer.is_ahead = self.ffn.settings.prefetch and layer.gate is None and is_worth_it
        if layer.is_ahead:
            self._look_ahead(layer, residual)
            self.look_s += RECENCY * (self.ffn.reader.clock() - started - self.look_s)

    def _look_ahead(self, layer: Layer, residual: Tensor) -> None:
        self.ffn.reader.wait(layer.pending)
        layer.pending = []
        wanted = self.ffn.predicted(layer, residual)
        n_missing = int((layer.cache.slot_of[wanted] < 0).sum())
        if n_missing == 0 or n_missing > layer.cache.n_slots // 4 or len(wanted) > layer.cache.n_slots:
            return
        self.ffn.tick += 1
        # Those that are there are claimed, too, or they would make room for the others and be read again.
        slots, missing = layer.cache.claim(wanted, self.ffn.tick)
        layer.cache.is_whole[slots[missing]] = True
        layer.pending = self._read(layer, wanted[missing], slots[missing], self.ffn.whole)
        self.ffn.activity.n_prefetched += len(missing)

    def _fetch(self, layer: Layer, wanted: Indices) -> tuple[Indices, list[Job]]:
        """The slots of `wanted`, and the reads that bring what is not there yet."""
        self.ffn.tick += 1
        if layer.pending and not layer.cache.has_room(len(wanted)):
            self.ffn.reader.wait(layer.pending)  # or a slot could go to somebody else while it is being written
            layer.pending = []
        slots, missing = layer.cache.claim(wanted, self.ffn.tick)
        self.ffn.activity.n_missing += len(missing)
        part = slice(0, 1) if self._in_two_phases(layer) else self.ffn.whole
        layer.cache.is_whole[slots[missing]] = part == self.ffn.whole
        jobs = layer.pending + self._read(layer, wanted[missing], slots[missing], part)
        layer.pending = []
        return slots, jobs

    def _in_two_phases(self, layer: Layer) -> bool:
        return self.ffn.settings.two_phase and layer.gate is None

    def _read(self, layer: Layer, positions: Indices, slots: Indices, part: slice) -> list[Job]:
        parts = [slice(i, i + 1) for i in range(part.start, part.stop)] if self.ffn.settings.by_matrix else [part]
        return [
            job
            for one in parts
            for job in self.ffn.reader.read(
                Target(layer.cold_offset, self.ffn.rows, one), positions, slots + layer.first_slot
            )
        ]

    def _blocks(
        self, layer: Layer, x: Tensor, fetched: tuple[Indices, Indices, list[Job]], gates: Tensor | None
    ) -> list[Tensor]:
        """The part of each block of active neurons, those first whose rows are there."""
        wanted, slots, jobs = fetched
        starts = range(0, len(wanted), self.ffn.block)
        if self._in_two_phases(layer):
            return self._two_phases(layer, x, fetched)
        found: dict[int, Tensor] = {}
        left = list(starts)
        while left:
            ready = [start for start in left if all(job.arrival.done() for job in self._jobs_of(jobs, wanted, start))]
            start = (ready or left)[0]
            self.ffn.reader.wait(self._jobs_of(jobs, wanted, start))
            places = self._places(layer, slots, start)
            known = None if gates is None else gates[:, self._padded(wanted, start) + layer.n_hot]
            found[start] = self._block(x, known, places, len(wanted) - start)
            left.remove(start)
        self.ffn.reader.wait(jobs)  # reads ahead that nobody wanted in the end
        return [found[start] for start in starts]

    def _block(self, x: Tensor, gate: Tensor | None, places: Tensor, n_real: int) -> Tensor:
        """(1, H): what these neurons put out; `gate` where it is resident."""
        if self.ffn.kernels is not None and gate is None:
            return self.ffn.neurons(x, self.ffn.rows.matrices, places, None)
        gate = self._times(x, "gate", places) if gate is None else gate
        return self._finish(x, self._closed(self.ffn.activation(gate), n_real), places)

    def _two_phases(self, layer: Layer, x: Tensor, fetched: tuple[Indices, Indices, list[Job]]) -> list[Tensor]:
        """As `_blocks`, but rows of up and down are read only where the gate is open."""
        wanted, slots, jobs = fetched
        self.ffn.reader.wait(jobs)
        acts: list[Tensor] = []
        for start in range(0, len(wanted), self.ffn.block):
            gate = self._times(x, "gate", self._places(layer, slots, start))
            acts.append(self._closed(self.ffn.activation(gate), len(wanted) - start))
        if not acts:
            return []
        is_open = (torch.cat(acts, dim=1)[0, : len(wanted)] != 0).numpy()
        needed = np.flatnonzero(is_open & ~layer.cache.is_whole[slots])
        layer.cache.is_whole[slots[needed]] = True
        part = slice(1, len(self.ffn.manifest.record.matrices))
        self.ffn.reader.wait(self._read(layer, wanted[needed], slots[needed], part))
        return [
            self._finish(x, act, self._places(layer, slots, index * self.ffn.block)) for index, act in enumerate(acts)
        ]

    def _places(self, layer: Layer, slots: Indices, start: int) -> Tensor:
        """The rows of a block of active neurons in the store."""
        return self._padded(slots, start) + layer.first_slot

    def _padded(self, ids: Indices, start: int) -> Tensor:
        """A block of `ids`, the last one repeated up to a multiple of `pad`.

        The matrix library keeps a program per shape: with every number of rows they would be hundreds, of 200 KB each.
        """
        part = ids[start : start + self.ffn.block]
        n_padded = min(-(-len(part) // self.pad) * self.pad, self.ffn.block)
        return torch.from_numpy(np.concatenate([part, np.repeat(part[-1:], n_padded - len(part))]))

    def _closed(self, act: Tensor, n_real: int) -> Tensor:
        """Without what padding repeats."""
        act[:, n_real:] = 0
        return act

    def _finish(self, x: Tensor, act: Tensor, places: Tensor) -> Tensor:
        if self.ffn.kernels is not None:
            return self.ffn.neurons(x, self.ffn.rows.matrices, places, act)
        hidden = act * self._times(x, "up", places)
        return self.ffn.workspace.mixed_rows(hidden, self.ffn.rows, "down", places).to(self.ffn.wide)

    def _times(self, x: Tensor, name: str, places: Tensor) -> Tensor:
        return self.ffn.workspace.times_rows(x, self.ffn.rows, name, places)

    def _jobs_of(self, jobs: list[Job], wanted: Indices, start: int) -> list[Job]:
        first, last = wanted[start], wanted[min(start + self.ffn.block, len(wanted)) - 1]
        return [job for job in jobs if job.first <= last and job.last >= first]
