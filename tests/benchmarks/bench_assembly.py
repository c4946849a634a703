"""Assembling a synthetic lake of 20,000 prompts x 50 candidates in six groups, and asking it a question.

    .venv/bin/python tests/benchmarks/bench_assembly.py [--prompts 2000 6000 20000]

Each size is assembled (best against worst, a quota, normalised scores, a test split) in a process of its own: seconds,
seconds per million candidates, and its peak memory as the kernel counts it. Query: `winnow query` as a new process,
import of Python and DuckDB included; scan: PyArrow reading the same two columns in this process.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from harness import options, show

from storage.lake import Lake
from storage.schema import CANDIDATES, TABLES, to_table
from storage.writer import Provenance, Shard

GROUPS = ("child", "clerk", "auditor", "nurse", "pilot", "poet")
SHARES = (0.5, 0.2, 0.1, 0.1, 0.05, 0.05)
N_CANDIDATES = 50
SHARD_PROMPTS = 1000
WORDS_PER_ANSWER = 35
QUERY = 'SELECT "group", COUNT(*) AS n, AVG(score) AS score, MAX(score) AS best FROM candidates GROUP BY 1 ORDER BY 1'
ROOT = Path(__file__).parents[2]


def main() -> None:
    settings = options(__doc__, prompts=[2000, 6000, 20000])
    rows = []
    for n_prompts in settings.prompts:
        with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
            build(folder, n_prompts)
            found = [measured("assemble", folder) for _ in range(settings.repeats)]
            asked = [timed_query(folder) for _ in range(settings.repeats)]
            n_rows = n_prompts * N_CANDIDATES
            seconds = statistics.median(one["seconds"] for one in found)
            rows.append(
                {
                    "candidates": n_rows,
                    "seconds": seconds,
                    "s per million": seconds / n_rows * 1e6,
                    "peak MB": max(one["peak_mb"] for one in found),
                    "pairs": found[0]["pairs"],
                    "query s": statistics.median(asked),
                    "scan s": measured("scan", folder)["seconds"],
                }
            )
    show("assembly", settings, rows)


def build(folder: str, n_prompts: int) -> None:
    """A lake with prompts and scored candidates, shard by shard."""
    lake, rng = Lake.open(folder), np.random.default_rng(0)
    names = [f"{i:032x}" for i in rng.permutation(n_prompts)]
    groups = rng.choice(GROUPS, n_prompts, p=SHARES)
    writer = lake.writer("prompts", "main", "0" * 12)
    rows = [prompt(name, str(group)) for name, group in zip(names, groups, strict=True)]
    writer.write(Shard("prompts", "train", 0, 1), to_table("prompts", rows))
    writer.commit(Provenance("ingest", {}, {}, {}, "benchmark"))
    writer = lake.writer("candidates", "main", "1" * 12)
    vocabulary = np.array(["".join(rng.choice(list("abcdefghijklmnop"), 5)) for _ in range(5000)])
    count = -(-n_prompts // SHARD_PROMPTS)
    for index in range(count):
        part = slice(index * SHARD_PROMPTS, (index + 1) * SHARD_PROMPTS)
        writer.write(Shard("candidates", "train", index, count), candidates(names[part], groups[part], vocabulary, rng))
    writer.commit(Provenance("score", {}, {"prompts": f"prompts/main@{'0' * 12}"}, {}, "benchmark"))


def prompt(name: str, group: str) -> dict[str, object]:
    messages = [{"role": "user", "content": f"question {name}"}]
    row = {"prompt_id": name, "messages": messages, "group": group}
    return row | {"reference": None, "source": "synthetic", "license": None}


def candidates(names: list[str], groups: np.ndarray, vocabulary: np.ndarray, rng: np.random.Generator) -> pa.Table:
    n = len(names) * N_CANDIDATES
    words = vocabulary[rng.integers(0, len(vocabulary), (n, WORDS_PER_ANSWER))]
    n_tokens = rng.integers(20, 60, n).astype(np.int32)
    is_cut = rng.random(n) < 0.4
    offsets = np.concatenate([[0], np.cumsum(n_tokens)]).astype(np.int32)
    token_ids = pa.ListArray.from_arrays(offsets, rng.integers(0, 32000, offsets[-1]).astype(np.int32))
    scores = np.where(is_cut, np.nan, rng.normal(size=n))
    columns: dict[str, object] = {
        "prompt_id": np.repeat(np.array(names, dtype=object), N_CANDIDATES),
        "group": np.repeat(groups.astype(object), N_CANDIDATES),
        "candidate_index": np.tile(np.arange(N_CANDIDATES, dtype=np.int32), len(names)),
        "response": [" ".join(row) for row in words],
        "token_ids": token_ids,
        "n_tokens": n_tokens,
        "finish_reason": np.where(is_cut, "cut", "eos").astype(object),
        "score": pa.array(scores, from_pandas=True),
        "generator": ["synthetic"] * n,
        "seed": np.zeros(n, dtype=np.int64),
        "status": ["ok"] * n,
        "cuts": [[]] * n,
        "scores": [[]] * n,
    }
    arrays = [
        pa.array(columns[field.name], type=field.type) if field.name in columns else pa.nulls(n, field.type)
        for field in CANDIDATES
    ]
    return pa.Table.from_arrays(arrays, schema=TABLES["candidates"])


def measured(what: str, folder: str) -> dict[str, float]:
    """Run `what` of this file in a new process."""
    command = [sys.executable, __file__, f"--{what}", folder]
    environment = {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "PATH": "/usr/bin:/bin", "HOME": folder}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def timed_query(folder: str) -> float:
    """Wall seconds of the command, from start to end."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "flows.cli", "query", QUERY, "--lake", folder]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - start


def run_assemble(folder: str) -> None:
    """Assemble anew: an earlier result is removed first."""
    import shutil

    from tasks.assemble import assemble, prepare
    from tasks.settings import AssembleConfig

    shutil.rmtree(Path(folder) / "preferences", ignore_errors=True)
    lake = Lake.open(folder)
    config = AssembleConfig(name="main", normalisation="zscore", max_pairs_per_group=5000, test_share=0.1)
    start = time.perf_counter()
    ref = assemble.fn(prepare(config, lake), folder)
    report(time.perf_counter() - start, pairs=lake.manifest(ref).stats["pairs"])


def run_scan(folder: str) -> None:
    """The least that the query must read."""
    lake = Lake.open(folder)
    start = time.perf_counter()
    lake.dataset(lake.resolve("candidates/main"), "candidates").to_table(columns=["group", "score"])
    report(time.perf_counter() - start)


def report(seconds: float, **more: object) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps({"seconds": seconds, "peak_mb": peak, **more}))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in ("--assemble", "--scan"):
        {"--assemble": run_assemble, "--scan": run_scan}[sys.argv[1]](sys.argv[2])
    else:
        main()
