"""What a machine can do for a bundle: memory, disk rates by block size, compute rates; measured or written down."""

import json
import mmap
import os
import time
import tomllib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import linear

from runtime.edge.layout import ALIGN
from runtime.errors import ConfigError

BLOCKS = (4096, 8192, 16384, 65536, 524288)
FILE_BYTES = 256 << 20
SECONDS = 0.4  # of each disk figure


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
    disk_mb_s: Mapping[int, float]  # random reads of so many bytes, by `io_threads` threads
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
        disk = {int(size): _positive(rate) for size, rate in found.pop("disk_mb_s").items()}
        clusters = tuple(
            Cores(str(one["name"]), int(one["count"]), _positive(one["dense_gb_s"]))
            for one in found.pop("clusters", [])
        )
        for key in ("memory_bytes", "cores", "io_threads", "sequential_mb_s", "dense_gb_s", "gather_gb_s"):
            _positive(found[key])
        return Hardware(disk_mb_s=dict(sorted(disk.items())), clusters=clusters, **found)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} has a value that does not fit: {error}; every rate is a number above 0") from error


def probe(folder: Path, io_threads: int = 4, clock: Callable[[], float] = time.perf_counter) -> Hardware:
    """Measure this machine: its disk at `folder` with a file of 256 MiB that is removed, its memory and one thread."""
    path = folder / ".winnow-probe"
    try:
        with path.open("xb") as file:
            piece = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8).tobytes()
            for _ in range(FILE_BYTES // len(piece)):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if not isinstance(error, FileExistsError):
            path.unlink(missing_ok=True)
        raise ConfigError(
            f'"{folder}" cannot be measured: {error.strerror}; give a writable folder with 256 MiB free, and remove '
            f'"{path.name}" if an earlier run left it'
        ) from error
    try:
        rates, is_direct = _disk(path, io_threads, clock)
    finally:
        path.unlink(missing_ok=True)
    dense, gather = _compute(clock)
    return Hardware(
        name=os.uname().nodename,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        disk_mb_s={size: rates[size] for size in BLOCKS},
        sequential_mb_s=rates[BLOCKS[-1]],
        io_threads=io_threads,
        dense_gb_s=dense,
        gather_gb_s=gather,
        is_direct=is_direct,
    )


def _disk(path: Path, io_threads: int, clock: Callable[[], float]) -> tuple[dict[int, float], bool]:
    """MB/s by block size, and whether reads went past the page cache."""
    flags, is_direct = os.O_RDONLY | getattr(os, "O_DIRECT", 0), hasattr(os, "O_DIRECT")
    try:
        file = os.open(path, flags)
        os.preadv(file, [mmap.mmap(-1, ALIGN)], 0)
    except OSError:
        file, is_direct = os.open(path, os.O_RDONLY), False
    try:
        return {size: round(_rate(file, size, io_threads, clock), 1) for size in BLOCKS}, is_direct
    finally:
        os.close(file)


def _rate(file: int, size: int, io_threads: int, clock: Callable[[], float]) -> float:
    places = np.random.default_rng(size).integers(0, FILE_BYTES // size, 1 << 16) * size
    deadline = clock() + SECONDS

    def read(turn: int) -> int:
        memory, n_reads = mmap.mmap(-1, size), 0
        for place in places[turn::io_threads].tolist():
            if clock() >= deadline:
                break
            n_reads += os.preadv(file, [memory], place) // size
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

    def gather() -> None:
        for part in torch.split(rows, 256):
            linear(x, torch.index_select(weights, 0, part, out=into))

    with torch.inference_mode():
        dense = min(_seconds(lambda: linear(x, weights), clock) for _ in range(5))
        scattered = min(_seconds(gather, clock) for _ in range(5))
    return round(weights.nbytes / dense / 1e9, 2), round(len(rows) * 4096 / scattered / 1e9, 2)


def _seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    run()
    return clock() - started


def _positive(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{value!r} is not a number above 0")
    return float(value)
