"""Many tokens through the feed-forward layers: each layer is read from one end to the other, a block ahead."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.edge.budget import stream_bytes
from runtime.edge.feedforward import Layer, Layers
from runtime.edge.layout import ALIGN, aligned
from runtime.edge.reader import Job, page_aligned
from runtime.edge.records import Matrix

Block = tuple[int, int, NDArray[np.uint8] | None]  # first and last cold neuron, records if not in the cache
RECENT = 64  # tokens of a prompt whose neurons stay in memory


class Streaming:
    """The dense way through `ffn`."""

    def __init__(self, ffn: Layers) -> None:
        self.ffn = ffn
        self.buffers = [page_aligned(stream_bytes(ffn.manifest)) for _ in range(2)]

    def stream(self, index: int, residual: Tensor, x: Tensor, is_sparse: bool) -> Tensor:
        """(T, H) of many tokens, the layer read from one end to the other.

        `is_sparse` leaves out the neurons that `decode` would leave out.
        """
        layer, x = self.ffn.layers[index], x.to(self.ffn.factor)
        code = self.ffn.code(layer, residual) if is_sparse and layer.gate is None else None
        total = self.ffn.hot(layer, x, None)
        self.ffn.reader.wait(layer.pending)
        layer.pending = []
        self.ffn.tick += 1
        for start, stop, records in self._streamed(layer):
            block = start, stop, records
            act = self.ffn.activation(self.ffn.workspace.times(x, *self._matrix(layer, "gate", block)))
            if code is not None:
                act *= self.ffn.is_predicted(layer, code, slice(start, stop))
            elif is_sparse:
                act *= self.ffn.is_open(layer, act)
            hidden = act * self.ffn.workspace.times(x, *self._matrix(layer, "up", block))
            total += self.ffn.workspace.mixed(hidden, *self._matrix(layer, "down", block)).to(self.ffn.wide)
            if records is not None:
                self._retain(layer, start, records, act)
        return total.to(self.ffn.dtype)

    def _streamed(self, layer: Layer) -> Iterator[Block]:
        """(start, stop, records) of each block in order; None where its rows are in the cache."""
        stride = self.ffn.manifest.record.stride
        starts = list(range(0, layer.n_cold, self.ffn.block))
        ahead: list[Job] | None = None
        for turn, start in enumerate(starts):
            stop = min(start + self.ffn.block, layer.n_cold)
            jobs, ahead = ahead, None
            if jobs is None and not layer.holds(start, stop):
                jobs = self._read_block(layer, start, stop, turn)
            if turn + 1 < len(starts) and not layer.holds(stop, min(stop + self.ffn.block, layer.n_cold)):
                ahead = self._read_block(layer, stop, min(stop + self.ffn.block, layer.n_cold), turn + 1)
            if jobs is None:
                yield start, stop, None
            else:
                self.ffn.reader.wait(jobs)
                inside = (layer.cold_offset + start * stride) % ALIGN
                records = self.buffers[turn % 2].numpy()[inside : inside + (stop - start) * stride]
                yield start, stop, records.reshape(-1, stride)

    def _read_block(self, layer: Layer, start: int, stop: int, turn: int) -> list[Job]:
        stride = self.ffn.manifest.record.stride
        first = (layer.cold_offset + start * stride) // ALIGN * ALIGN
        n_bytes = aligned(layer.cold_offset + stop * stride) - first
        return self.ffn.reader.read_range(first, self.buffers[turn % 2].numpy()[:n_bytes])

    def _matrix(self, layer: Layer, name: str, block: Block) -> tuple[Matrix, slice]:
        """Where a matrix of a block of neurons is, and its rows there."""
        start, stop, records = block
        if name == "gate" and layer.gate is not None:
            return layer.gate, slice(layer.n_hot + start, layer.n_hot + stop)
        if records is not None:
            return self.ffn.workspace.from_records(records, name), slice(None)
        slots = layer.cache.slot_of[start:stop].astype(np.int64) + layer.first_slot
        return self.ffn.workspace.from_rows(self.ffn.rows, name, torch.from_numpy(slots)), slice(None)

    def _retain(self, layer: Layer, start: int, records: NDArray[np.uint8], act: Tensor) -> None:
        """Keep the neurons of a block that the newest tokens used most: the answer goes on from there."""
        if not self.ffn.settings.keeps or layer.cache.n_slots == 0:
            return
        uses = (act[-RECENT:] != 0).sum(dim=0).numpy()
        quota = min(layer.cache.n_slots * len(records) // layer.n_cold, layer.cache.n_old(self.ffn.tick))
        chosen = np.argsort(-uses, kind="stable")[:quota]
        # Where all have room, all stay.
        chosen = np.sort(chosen[(uses[chosen] > 0) | (layer.cache.n_slots == layer.n_cold)])
        slots, missing = layer.cache.claim(start + chosen, self.ffn.tick)
        layer.cache.is_whole[slots] = True
        starts = chosen[missing] * self.ffn.manifest.record.stride
        self.ffn.rows.put(slots[missing] + layer.first_slot, records.reshape(-1), starts, self.ffn.whole)
