"""Ten million prompts without a single token: what scheduling, listing and manifests of that many shards cost.

    PYTHONPATH=. .venv/bin/python tests/benchmarks/bench_ten_million.py [--prompts 10000000] [--shard-prompts 4096]

Real: the lake's listing, the look for missing shards, the manifest (written, read, its size). Simulated: the workers,
whose shards take log-normal times, under the order in which `tasks.runners.submit_all` hands shards out.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import random
import resource
import tempfile
import time
from pathlib import Path

from storage.lake import FileEntry, Lake, Manifest
from storage.manifest import now
from storage.schema import SCHEMA_VERSION
from storage.writer import Shard
from tasks.runners import AHEAD, missing_shards
from tasks.settings import IngestConfig
from tasks.versions import Step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10_000_000)
    parser.add_argument("--shard-prompts", type=int, default=4096)
    settings = parser.parse_args()
    count = -(-settings.prompts // settings.shard_prompts)
    print(f"{settings.prompts:,} prompts in {count:,} shards of {settings.shard_prompts}")
    with tempfile.TemporaryDirectory() as folder:
        listing(folder, count)
    manifest(count)
    for workers in (8, 64, 256, 1024):
        for spread in (0.2, 0.6):
            share = utilisation(count, workers, spread)
            print(f"{workers:5} workers, shard times vary by {spread:.0%}: {share:6.1%} busy")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


def listing(folder: str, count: int) -> None:
    """A version with every second shard, and how long it takes to see which are missing."""
    step = Step("generate", "candidates", "ten-million", IngestConfig(name="ten-million"))
    prefix = step.writer(Lake.open(folder)).ref.prefix
    place = Path(folder, prefix, "candidates")
    place.mkdir(parents=True)
    for index in range(0, count, 2):
        Path(folder, prefix, Shard("candidates", "train", index, count).path).touch()
    started = time.perf_counter()
    missing = missing_shards(step, folder, count)
    assert len(missing) == count // 2
    print(f"which shards are missing: {time.perf_counter() - started:.3f} s")


def manifest(count: int) -> None:
    """One entry per shard."""
    digest = hashlib.sha256(b"").hexdigest()
    files = tuple(
        FileEntry(
            path=Shard("candidates", "train", index, count).path,
            sha256=digest,
            size_bytes=20_000_000,
            rows=65_536,
            table="candidates",
            split="train",
        )
        for index in range(count)
    )
    started = time.perf_counter()
    text = Manifest(
        kind="candidates",
        name="ten-million",
        version="0" * 12,
        stage="generate",
        created_at=now(),
        schema_version=SCHEMA_VERSION,
        config={},
        inputs={},
        stats={},
        command="winnow generate",
        files=files,
    ).model_dump_json(indent=2)
    written = time.perf_counter()
    Manifest.model_validate_json(text)
    read = time.perf_counter()
    print(f"manifest: {len(text) / 1e6:.2f} MB, made in {written - started:.3f} s, read in {read - written:.3f} s")


def utilisation(count: int, workers: int, spread: float) -> float:
    """Share of the workers' time that is work, when at most AHEAD x workers shards are out."""
    rng = random.Random(0)
    times = [rng.lognormvariate(0, spread) for _ in range(count)]
    free = [0.0] * workers  # when each worker is free again
    out: list[float] = []  # ends of the shards that are out
    clock = end = 0.0
    for seconds in times:
        if len(out) >= AHEAD * workers:
            clock = max(clock, heapq.heappop(out))
        ends = max(heapq.heappop(free), clock) + seconds
        heapq.heappush(free, ends)
        heapq.heappush(out, ends)
        end = max(end, ends)
    return sum(times) / (end * workers)


if __name__ == "__main__":
    main()
