"""Neurons from disk into memory: merged, aligned reads past the page cache, by the kernel or by a few threads."""

import mmap
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.edge.batched import Batch, Flight, Reads
from runtime.edge.cache import Indices
from runtime.edge.layout import ALIGN, RecordLayout, aligned
from runtime.edge.placement import read_runs
from runtime.edge.store import Rows
from runtime.errors import BundleError

Clock = Callable[[], float]
PIECE = 1 << 19  # bytes of one sequential read
SHARE = 32  # reads that are started together, or by a thread of their own
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


class Arrival(Protocol):
    """A `Future`, or what is like one."""

    def done(self) -> bool:
        """Whether `result` would come at once."""
        ...

    def result(self) -> object:
        """Wait for it; raises what went wrong."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """Reads that are under way; they bring the neurons first..last of those asked for."""

    future: Arrival
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Target:
    """Where cold neurons of a layer lie, and where they go."""

    offset: int
    rows: Rows
    part: slice  # of the matrices of a record


@dataclass(slots=True)
class Landing:
    """Reads that the kernel does; whoever waits for them copies what they brought to its slots."""

    flight: Flight
    memory: NDArray[np.uint8]
    starts: Indices  # in it, of each neuron
    target: Target
    slots: Indices
    is_over: bool = False

    def done(self) -> bool:
        """Whether all reads have ended."""
        return self.is_over or self.flight.done()

    def result(self) -> None:
        """Wait for the reads, and copy."""
        if self.is_over:
            return
        if not self.flight.wait():
            raise BundleError(SHORTER)
        self.target.rows.put(self.slots, self.memory, self.starts, self.target.part)
        self.is_over = True


@dataclass(slots=True)
class Runway:
    """Memory that the kernel reads into, filled from its start until nobody is on it any more."""

    batch: Batch
    memory: NDArray[np.uint8]
    filled: int = 0
    landings: list[Landing] = field(default_factory=list)

    def start(self, reads: Reads, starts: Indices, target: Target, slots: Indices) -> Landing:
        """Reads into the next free bytes; those before them are waited for where there are too few."""
        n_bytes = int(reads[:, 2].sum())
        if self.filled + n_bytes > self.memory.size:
            for landing in self.landings:
                landing.result()
        if all(landing.is_over for landing in self.landings):
            self.landings, self.filled = [], 0
        reads[:, 1] += self.filled
        found = Landing(self.batch.start(reads), self.memory, starts + self.filled, target, slots)
        self.filled += n_bytes
        self.landings.append(found)
        return found


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
        self.runway = self._runway()
        self.pool = ThreadPoolExecutor(settings.threads, "winnow-read", self._start)

    def close(self) -> None:
        """Wait for what is under way, and end the threads."""
        self.pool.shutdown(cancel_futures=True)
        if self.runway is not None:
            self.runway.batch.close()
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
            future = self._begin(reads, inside[one:two], target, slots[one:two])
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
        """Reads [begin, end) that are done together, and fit the memory of a thread."""
        n_each = SHARE if self.runway is not None else max(SHARE, -(-len(length) // self.settings.threads))
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
        """Page-aligned memory of this thread, where it reads neurons."""
        if self.runway is None:
            memory = _own_memory(self.staging_bytes)
            self.local.view, self.local.bytes = memoryview(memory), np.frombuffer(memory, dtype=np.uint8)

    def _runway(self) -> Runway | None:
        """Where the system can read while we go on; through the page cache it would not go on."""
        if not self.is_direct:
            return None
        memory = _own_memory(self.settings.threads * self.staging_bytes)
        try:
            return Runway(Batch(self.file, memory), np.frombuffer(memory, dtype=np.uint8))
        except OSError:
            return None

    def _begin(self, reads: Reads, starts: Indices, target: Target, slots: Indices) -> Arrival:
        if self.runway is None:
            return self.pool.submit(self._fetch, reads, starts, target, slots)
        self._count(reads)
        return self.runway.start(reads, starts, target, slots)

    def _fetch(self, reads: Reads, starts: Indices, target: Target, slots: Indices) -> None:
        self._read(reads, self.local.view)
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
