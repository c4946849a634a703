"""What a machine can do for a bundle: memory, disk rates by block size, compute rates; measured or written down.

Measured as the engine reads and computes: by the kernel many at a time and in compiled loops, where there is that.
"""

import json
import mmap
import os
import re
import time
import tomllib
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch.nn.functional import linear

from runtime.edge.batched import Batch, Flight
from runtime.edge.layout import ALIGN
from runtime.edge.native import as_matrix, kernels
from runtime.errors import ConfigError

BLOCKS = (4096, 8192, 16384, 65536, 524288)
FILE_BYTES = 256 << 20
SECONDS = 0.4  # of each disk figure
AT_ONCE = 32  # reads that the kernel is given together
MOST = 1e18  # of any number of a description


@dataclass(frozen=True, slots=True)
class Cores:
    """Cores of a kind, for the model of a machine that is not this one."""

    name: str
    count: int
    dense_gb_s: float


@dataclass(frozen=True, slots=True)
class Hardware:
    """Bytes per second are of weights that a product of one token reads; `gather` copies rows first."""

    name: str
    memory_bytes: int
    cores: int
    disk_mb_s: Mapping[int, float]  # random reads of so many bytes, by the kernel or else by `io_threads` threads
    sequential_mb_s: float
    io_threads: int
    dense_gb_s: float
    gather_gb_s: float
    is_direct: bool = True
    npu_gb_s: float = 0.0  # 0: there is none. Modelled, never executed here
    clusters: tuple[Cores, ...] = ()  # big.LITTLE; modelled, never executed here

    def disk(self, n_bytes: float) -> float:
        """MB/s of random reads of `n_bytes`, between the measured sizes in proportion to their logarithms."""
        sizes = sorted(self.disk_mb_s)
        return float(np.interp(np.log(max(n_bytes, 1)), np.log(sizes), [self.disk_mb_s[size] for size in sizes]))

    def to_toml(self) -> str:
        """As `load` reads it."""
        found = asdict(self)
        disk, clusters = found.pop("disk_mb_s"), found.pop("clusters")
        lines = [f"{key} = {json.dumps(value)}" for key, value in found.items()]
        lines += ["", "[disk_mb_s]", *(f'"{size}" = {rate}' for size, rate in disk.items())]
        for cluster in clusters:
            lines += ["", "[[clusters]]", *(f"{key} = {json.dumps(value)}" for key, value in cluster.items())]
        return "\n".join(lines) + "\n"


def load(path: Path) -> Hardware:
    """A description in TOML; ConfigError names what is missing or does not fit."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f'hardware file "{path}" cannot be read: {error}; `winnow probe --output` writes one'
        ) from error
    known = {field.name for field in fields(Hardware)}
    needed = known - {"is_direct", "npu_gb_s", "clusters"}
    if unknown := set(found) - known:
        raise ConfigError(f'"{min(unknown)}" in {path} is not known; the keys are {", ".join(sorted(known))}')
    if missing := needed - set(found):
        raise ConfigError(f'{path} lacks "{min(missing)}"; `winnow probe --output FILE` shows all keys')
    try:
        return _hardware(found)
    except ValueError as error:
        raise ConfigError(f"{path} has a value that does not fit: {error}") from error


def _hardware(found: Mapping[str, object]) -> Hardware:
    disk, clusters = found["disk_mb_s"], found.get("clusters", [])
    if not isinstance(disk, dict) or not disk:
        raise ValueError("disk_mb_s must be a table of a rate per block size")
    if not isinstance(clusters, list) or not all(isinstance(one, dict) for one in clusters):
        raise ValueError("clusters must be tables, [[clusters]]")
    name, is_direct, npu = found["name"], found.get("is_direct", True), found.get("npu_gb_s", 0.0)
    if not isinstance(name, str):
        raise ValueError(f"name = {name!r} is not a text")
    if not isinstance(is_direct, bool):
        raise ValueError(f"is_direct = {is_direct!r} is neither true nor false")
    return Hardware(
        name=name,
        memory_bytes=_whole("memory_bytes", found["memory_bytes"]),
        cores=_whole("cores", found["cores"]),
        disk_mb_s={_block(size): _positive(f'disk_mb_s."{size}"', disk[size]) for size in sorted(disk, key=_block)},
        sequential_mb_s=_positive("sequential_mb_s", found["sequential_mb_s"]),
        io_threads=_whole("io_threads", found["io_threads"]),
        dense_gb_s=_positive("dense_gb_s", found["dense_gb_s"]),
        gather_gb_s=_positive("gather_gb_s", found["gather_gb_s"]),
        is_direct=is_direct,
        npu_gb_s=0.0 if npu == 0 and not isinstance(npu, bool) else _positive("npu_gb_s", npu),
        clusters=tuple(_cores(one) for one in clusters),
    )


def _cores(found: Mapping[str, object]) -> Cores:
    if set(found) != {"name", "count", "dense_gb_s"}:
        raise ValueError(f"[[clusters]] has {', '.join(sorted(found))}, not name, count and dense_gb_s")
    return Cores(str(found["name"]), _whole("count", found["count"]), _positive("dense_gb_s", found["dense_gb_s"]))


def probe(folder: Path, io_threads: int = 4, clock: Callable[[], float] = time.perf_counter) -> Hardware:
    """Measure this machine: its disk at `folder` with a file of 256 MiB that is removed, its memory and one thread."""
    path = folder / ".winnow-probe"
    try:
        with path.open("xb") as file:
            try:
                _fill(file)
                rates, is_direct = _disk(path, io_threads, clock)
            finally:  # of what was interrupted, too; but not of a file that was there
                path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f'"{folder}" cannot be measured: {error.strerror}; give a writable folder with 256 MiB free, and remove '
            f'"{path.name}" if an earlier run left it'
        ) from error
    dense, gather = _compute(clock)
    return Hardware(
        name=os.uname().nodename,
        memory_bytes=memory_bytes(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        disk_mb_s={size: rates[size] for size in BLOCKS},
        sequential_mb_s=rates[BLOCKS[-1]],
        io_threads=io_threads,
        dense_gb_s=dense,
        gather_gb_s=gather,
        is_direct=is_direct,
    )


def memory_bytes(root: Path = Path("/")) -> int:
    """The memory of this machine, or the least that a control group around this process allows of it."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / "sys/fs/cgroup" / controllers
        folder, name = base / place.strip("/"), "memory.limit_in_bytes" if controllers else "memory.max"
        # Inside a container the place is often one of the host's, and the limit that of the mounted root.
        folders = [folder, *(parent for parent in folder.parents if parent.is_relative_to(base))]
        limits = [_text(one / name).strip() for one in folders]
        found += [int(limit) for limit in limits if limit.isdigit()]
    return min(found)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # no control groups, or others than these
        return ""


def _fill(file: BinaryIO) -> None:
    piece = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8).tobytes()
    for _ in range(FILE_BYTES // len(piece)):
        file.write(piece)
    file.flush()
    os.fsync(file.fileno())


def _disk(path: Path, io_threads: int, clock: Callable[[], float]) -> tuple[dict[int, float], bool]:
    """MB/s by block size, and whether reads went past the page cache."""
    flags, is_direct = os.O_RDONLY | getattr(os, "O_DIRECT", 0), hasattr(os, "O_DIRECT")
    try:
        file = os.open(path, flags)
        os.preadv(file, [mmap.mmap(-1, ALIGN)], 0)
    except OSError:
        file, is_direct = os.open(path, os.O_RDONLY), False
    try:
        rate = _rate_of_batches if is_direct and _has_batches(file) else _rate_of_threads
        return {size: round(rate(file, size, io_threads, clock), 1) for size in BLOCKS}, is_direct
    finally:
        os.close(file)


def _has_batches(file: int) -> bool:
    try:
        Batch(file, mmap.mmap(-1, ALIGN)).close()
    except OSError:
        return False
    return True


def _rate_of_batches(file: int, size: int, io_threads: int, clock: Callable[[], float]) -> float:
    """Two batches are always under way, whatever `io_threads`."""
    places = np.random.default_rng(size).integers(0, FILE_BYTES // size, 1 << 16).reshape(-1, AT_ONCE) * size
    memory = mmap.mmap(-1, 2 * AT_ONCE * size)
    batch, reads = Batch(file, memory), np.empty((AT_ONCE, 3), dtype=np.int64)
    reads[:, 2] = size
    started, n_reads, under_way = clock(), 0, deque[Flight]()
    for turn, offsets in enumerate(places):
        reads[:, 0], reads[:, 1] = offsets, (turn % 2 * AT_ONCE + np.arange(AT_ONCE)) * size
        under_way.append(batch.start(reads))
        if len(under_way) == 2:
            n_reads += AT_ONCE * under_way.popleft().wait()
            if clock() - started >= SECONDS:  # after a read: on a machine that is too busy a rate is low, not zero
                break
    seconds = clock() - started
    batch.close()
    return n_reads * size / seconds / 1e6


def _rate_of_threads(file: int, size: int, io_threads: int, clock: Callable[[], float]) -> float:
    places = np.random.default_rng(size).integers(0, FILE_BYTES // size, 1 << 16) * size
    deadline = clock() + SECONDS

    def read(turn: int) -> int:
        memory, n_reads = mmap.mmap(-1, size), 0
        for place in places[turn::io_threads].tolist():
            n_reads += os.preadv(file, [memory], place) // size
            if clock() >= deadline:  # after a read: on a machine that is too busy a rate is low, not zero
                break
        return n_reads

    started = clock()
    with ThreadPoolExecutor(io_threads) as pool:
        n_reads = sum(pool.map(read, range(io_threads)))
    return n_reads * size / (clock() - started) / 1e6


def _compute(clock: Callable[[], float]) -> tuple[float, float]:
    """GB/s of bfloat16 weights through a product with one row: all in one piece, and scattered rows gathered first."""
    weights = torch.ones(16384, 2048, dtype=torch.bfloat16)  # 64 MiB: more than any cache holds
    x = torch.ones(1, 2048, dtype=torch.bfloat16)
    rows = torch.randperm(16384, generator=torch.Generator().manual_seed(0))[:2048].sort().values
    into = torch.empty(256, 2048, dtype=torch.bfloat16)
    loops = kernels(torch.bfloat16)

    def multiply() -> None:
        if loops is not None:
            loops.times(x, as_matrix(weights))
        else:
            linear(x, weights)

    def gather() -> None:
        for part in torch.split(rows, 256):
            if loops is not None:
                loops.times(x, as_matrix(weights), part)
            else:
                linear(x, torch.index_select(weights, 0, part, out=into))

    with torch.inference_mode():
        dense = min(_seconds(multiply, clock) for _ in range(5))
        scattered = min(_seconds(gather, clock) for _ in range(5))
    return round(weights.nbytes / dense / 1e9, 2), round(len(rows) * 4096 / scattered / 1e9, 2)


def _seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    run()
    return clock() - started


def _positive(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < MOST:
        raise ValueError(f"{name} = {value!r} is not a number above 0")
    return float(value)


def _whole(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < MOST:
        raise ValueError(f"{name} = {value!r} is not a whole number above 0")
    return value


def _block(size: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,11}", size):
        raise ValueError(f'"{size}" in disk_mb_s is not a block size, a whole number of bytes above 0')
    return int(size)
