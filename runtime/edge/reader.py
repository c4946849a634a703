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
from runtime.edge.reads import Limits, Ranges, read_starts
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

    arrival: Arrival
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
        offset, n_bytes = target.offset + target.part.start * size, (target.part.stop - target.part.start) * size
        # The kernel is given some at a time: what it brings first is computed first. Threads share all there is.
        n_each = SHARE if self.runway is not None else max(SHARE, -(-len(positions) // self.settings.threads))
        limits = Limits(self.settings.gap_bytes // stride, n_each, self.staging_bytes)
        jobs: list[Job] = []
        for some in read_starts(positions, Ranges(offset, stride, n_bytes), limits):
            arrival = self._begin(some.reads, some.inside, target, slots[some.first : some.last + 1])
            jobs.append(Job(arrival, int(positions[some.first]), int(positions[some.last])))
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
            job.arrival.result()
        self.counters.wait_s += self.clock() - started

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
