"""Neurons from disk into memory: merged, aligned reads past the page cache, by a few threads."""

import mmap
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.edge.batched import Batch, Reads
from runtime.edge.cache import Indices
from runtime.edge.layout import ALIGN, RecordLayout, aligned
from runtime.edge.placement import read_runs
from runtime.edge.store import Rows
from runtime.errors import BundleError

Clock = Callable[[], float]
PIECE = 1 << 19  # bytes of one sequential read
SHARE = 32  # reads that are worth a thread of their own
SHORTER = "the neuron file became shorter while it was in use; copy the bundle again"


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """How a bundle is read."""

    threads: int = 4
    direct: bool = True
    gap_bytes: int = 16384  # that may lie unused between two neurons that share a read


@dataclass(slots=True)
class Counters:
    """What was read so far."""

    read_bytes: int = 0
    n_reads: int = 0
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Job:
    """A read that some thread does; it brings the neurons first..last of those asked for."""

    future: "Future[None]"
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Target:
    """Where cold neurons of a layer lie, and where they go."""

    offset: int
    rows: Rows
    part: slice  # of the matrices of a record


class Reader:
    """The neuron file of one bundle."""

    def __init__(
        self, path: Path, record: RecordLayout, settings: ReadSettings, staging_bytes: int, clock: Clock
    ) -> None:
        self.record, self.settings, self.counters = record, settings, Counters()
        self.clock = clock
        self.staging_bytes = staging_bytes  # of each thread
        self.gap = settings.gap_bytes // record.stride
        self.most = max(1, (staging_bytes - 2 * ALIGN) // record.stride)
        self.file, self.is_direct = _open(path, settings.direct)
        self.local, self.lock = threading.local(), threading.Lock()
        self.batches: list[Batch] = []
        self.pool = ThreadPoolExecutor(settings.threads, "winnow-read", self._start)
        self.ahead = ThreadPoolExecutor(1, "winnow-ahead")  # decides what to read next

    def close(self) -> None:
        """End the threads."""
        self.ahead.shutdown()
        self.pool.shutdown(cancel_futures=True)
        for batch in self.batches:
            batch.close()
        os.close(self.file)

    def read(self, target: Target, positions: Indices, slots: Indices) -> list[Job]:
        """Start reading the cold neurons at sorted `positions` into `slots`."""
        if not len(positions):
            return []
        stride, size = self.record.stride, self.record.part_bytes
        low, high = target.part.start * size, target.part.stop * size
        runs = read_runs(positions, self.gap, self.most)
        first, count, served = runs.T
        start = (target.offset + first * stride + low) // ALIGN * ALIGN
        length = -(-(target.offset + (first + count - 1) * stride + high) // ALIGN) * ALIGN - start
        run_of = np.repeat(np.arange(len(runs)), served)
        # Of each neuron, the bytes from the start of its read to its first.
        inside = target.offset + positions * stride + low - start[run_of]
        ends = np.cumsum(served)
        jobs: list[Job] = []
        for begin, end in self._shares(length):
            one, two = (0 if begin == 0 else int(ends[begin - 1])), int(ends[end - 1])
            at = np.cumsum(length[begin:end]) - length[begin:end]
            inside[one:two] += at[run_of[one:two] - begin]
            reads = np.stack([start[begin:end], at, length[begin:end]], axis=1)
            future = self.pool.submit(self._fetch, reads, target, inside[one:two], slots[one:two])
            jobs.append(Job(future, int(positions[one]), int(positions[two - 1])))
        return jobs

    def read_range(self, offset: int, into: NDArray[np.uint8]) -> list[Job]:
        """Start reading consecutive bytes into page-aligned memory."""
        view = memoryview(into)  # type: ignore[arg-type]
        starts = range(0, into.size, PIECE)
        pieces = [np.array([[offset + start, start, min(PIECE, into.size - start)]]) for start in starts]
        return [Job(self.pool.submit(self._read, piece, view), 0, 0) for piece in pieces]

    def wait(self, jobs: Sequence[Job]) -> None:
        """Until all `jobs` are done."""
        started = self.clock()
        for job in jobs:
            job.future.result()
        self.counters.wait_s += self.clock() - started

    def _shares(self, length: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Reads [begin, end) for one thread each: about as many for all, and no more than fit its memory."""
        n_each = max(SHARE, -(-len(length) // self.settings.threads))
        if len(length) <= n_each and length.sum() <= self.staging_bytes:
            return [(0, len(length))]
        shares: list[tuple[int, int]] = []
        begin, filled = 0, 0
        for index, n_bytes in enumerate(length.tolist()):
            if index > begin and (index - begin == n_each or filled + n_bytes > self.staging_bytes):
                shares.append((begin, index))
                begin, filled = index, 0
            filled += n_bytes
        return [*shares, (begin, len(length))]

    def _start(self) -> None:
        """Page-aligned memory of this thread."""
        memory = _own_memory(self.staging_bytes)
        self.local.view = memoryview(memory)
        self.local.batch = self._batch(memory)
        self.local.bytes = np.frombuffer(memory, dtype=np.uint8)

    def _batch(self, memory: mmap.mmap) -> Batch | None:
        """Reads of this thread at once, where the system has that; through the page cache it would gain nothing."""
        if not self.is_direct:
            return None
        try:
            found = Batch(self.file, memory)
        except OSError:
            return None
        self.batches.append(found)
        return found

    def _fetch(self, reads: Reads, target: Target, starts: Indices, slots: Indices) -> None:
        batch: Batch | None = self.local.batch
        if batch is None:
            self._read(reads, self.local.view)
        elif batch.read(reads):
            self._count(reads)
        else:
            raise BundleError(SHORTER)
        target.rows.put(slots, self.local.bytes, starts, target.part)

    def _read(self, reads: Reads, memory: memoryview) -> None:
        for offset, at, length in reads.tolist():
            if os.preadv(self.file, [memory[at : at + length]], offset) != length:
                raise BundleError(SHORTER)
            if not self.is_direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self.file, offset, length, os.POSIX_FADV_DONTNEED)
        self._count(reads)

    def _count(self, reads: Reads) -> None:
        with self.lock:
            self.counters.read_bytes += int(reads[:, 2].sum())
            self.counters.n_reads += len(reads)


def page_aligned(n_bytes: int) -> Tensor:
    """Zeroed memory (uint8) that starts at a page."""
    return torch.frombuffer(_own_memory(max(aligned(n_bytes), ALIGN)), dtype=torch.uint8)


def _own_memory(n_bytes: int) -> mmap.mmap:
    """Pages of this process alone: without the flags they are shared, which the kernel does not count as anonymous."""
    return mmap.mmap(-1, n_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _open(path: Path, direct: bool) -> tuple[int, bool]:
    """The file, past the page cache where the file system allows it."""
    flags = os.O_RDONLY | os.O_NOFOLLOW
    if direct and hasattr(os, "O_DIRECT"):
        try:
            found = os.open(path, flags | os.O_DIRECT)
            try:
                os.preadv(found, [memoryview(_own_memory(ALIGN))], 0)
                return found, True
            except OSError:
                os.close(found)
        except OSError:
            pass  # tmpfs and some network file systems refuse; reads then go through the page cache and leave it
    found = os.open(path, flags)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(found, 0, 0, os.POSIX_FADV_RANDOM)
    return found, False
