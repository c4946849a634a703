"""A model of about 1 GiB below its size: this runtime against streaming, against mapped files, and against itself.

    .venv/bin/python tests/benchmarks/bench_edge.py [--tokens 64] [--repeats 3] [--size small] [--work DIR]

Every arm is a process of its own and decodes the same given tokens, one by one, on one compute thread; arms take
turns, and of each the repeat of median speed counts.
- dense, in memory: transformers, everything loaded. sparse, in memory: this engine without a budget.
- stream: every layer read from one end to the other for each token, the next block while one is computed.
- mmap: transformers on weights mapped from the file, in a control group that holds what the engine at 50 % or 25 % may
  use, and the interpreter (needs root and cgroup v1; left out where that is missing).
- edge 50/30/25 %: this engine. The budget is attention, embeddings and keys, plus that share of the feed-forward bytes;
  predictors, buffers and everything else come out of the share.
- torch alone: the same without the compiled loops of the extra `native`, which every other arm of this engine has.
- ladder, at 30 %: base (no cache, three reads per neuron), bundle (one read), cache (hot block and slots), pipeline
  (reads beside compute, and ahead where that is worth it), placement (cold order by co-activation, reads merged over
  gaps of a neuron).
`cpu` is of the computing thread alone; `io` is read_bytes of /proc/self/io; `over` is the peak of anonymous and shared
memory (RssAnon + RssShmem), looked at every 5 ms from before the bundle is opened and above what was there then, over
the budget. `low` and `high` are the slowest and fastest repeat. `--hardware FILE` of `winnow probe` adds what
`winnow plan-edge` predicts.
The last steps of the ladder are smaller than a shared machine's speed changes from one minute to the next. So they, and
30 % against memory, are also measured within one process, where the two take turns token by token (`--pair-tokens`):
how many times as fast one is in all tokens together, and in the median token.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import edge_model
import torch
from harness import options, show
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from runtime.edge.budget import RunSettings
from runtime.edge.bundle import open_bundle
from runtime.edge.engine import EdgeModel
from runtime.edge.hardware import load
from runtime.edge.native import as_matrix, kernels
from runtime.edge.planner import plan
from runtime.edge.reader import ReadSettings
from runtime.edge.records import LayerPredictor

WARM, CONTEXT = 64, 512
CGROUPS = Path("/sys/fs/cgroup/memory")
PLAIN = RunSettings(max_tokens=CONTEXT, prefill_tokens=64, read=ReadSettings(threads=1, gap_bytes=0))
SLOW = replace(PLAIN, overlaps=False, prefetch=False)
FULL = replace(PLAIN, read=ReadSettings(threads=4, gap_bytes=0))
PLACED = replace(PLAIN, read=ReadSettings(threads=4))
# name: (bundle, share of the feed-forward bytes, settings)
EDGE: dict[str, tuple[str, float | None, RunSettings]] = {
    "sparse, in memory": ("placed", None, PLACED),
    "edge 50 %": ("placed", 0.50, PLACED),
    "edge 30 %": ("placed", 0.30, PLACED),
    "edge 25 %": ("placed", 0.25, PLACED),
    "in memory, torch alone": ("placed", None, replace(PLACED, native=False)),
    "25 %, torch alone": ("placed", 0.25, replace(PLACED, native=False)),
    "ladder base": ("flat", 0.30, replace(SLOW, keeps=False, by_matrix=True)),
    "ladder bundle": ("flat", 0.30, replace(SLOW, keeps=False)),
    "ladder cache": ("hot", 0.30, SLOW),
    "ladder pipeline": ("hot", 0.30, FULL),
    "ladder placement": ("placed", 0.30, PLACED),
    "stream": ("flat", 0.25, replace(FULL, keeps=False)),
}
MMAP = {"mmap 50 %": 0.50, "mmap 25 %": 0.25}
OWN = ("RssAnon", "RssShmem")
DENSE = "dense, in memory"
PAIRS = (
    ("sparse, in memory", "edge 30 %"),
    ("ladder cache", "ladder pipeline"),
    ("ladder pipeline", "ladder placement"),
)
SLOW_ARMS = ("stream", "mmap 50 %", "mmap 25 %", "ladder base", "ladder bundle")


def main() -> None:
    settings = options(
        __doc__, tokens=64, slow_tokens=8, pair_tokens=192, size="1g", work="edge-bench", hardware="", arm="", only=[""]
    )
    work = Path(settings.work) / settings.size
    if settings.arm:
        print(json.dumps(_child(settings, work)))
        return
    _prepare(settings.size, work)
    arms = [DENSE, *EDGE, *MMAP]
    chosen = [arm for arm in arms if settings.only == [""] or arm in settings.only]
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in chosen}
    pairs = [pair for pair in PAIRS if set(pair) <= set(chosen)]
    steps: dict[tuple[str, str], list[dict[str, float]]] = {pair: [] for pair in pairs}
    for _ in range(settings.repeats):
        for pair in pairs:
            step = _run(" / ".join(pair), work, settings)
            if step is not None:
                steps[pair].append(step)
        for arm in chosen:
            result = _run(arm, work, settings)
            if result is not None:
                found[arm].append(result)
    rows = [_row(arm, results) for arm, results in found.items() if results]
    by_arm = {str(row["arm"]): float(str(row["tokens/s"])) for row in rows}
    for row in rows:
        for baseline in ("stream", DENSE, "sparse, in memory"):
            if baseline in by_arm:
                row[f"x {baseline}"] = float(str(row["tokens/s"])) / by_arm[baseline]
    show("edge", settings, rows)
    compared: list[dict[str, object]] = [
        {"step": f"{one} -> {other}", "repeats": len(found)}
        | {f"x {kind}": [round(step[kind], 3) for step in found] for kind in ("all tokens", "median token")}
        for (one, other), found in steps.items()
    ]
    if compared:
        show("edge-steps", settings, compared)


def _prepare(size: str, work: Path) -> None:
    """The model and its three bundles, unless they are there."""
    if (work / "done").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    found = edge_model.build(size)
    profile = found.profile(edge_model.text(size, 2048, seed=1, topic_tokens=32))
    for name, hot, by_activity in (("flat", False, False), ("hot", True, False), ("placed", True, True)):
        edge_model.write(work / name, found, profile, hot, by_activity)
    save_file(
        {name: tensor.contiguous() for name, tensor in found.model.state_dict().items()}, work / "model.safetensors"
    )
    (work / "config.json").write_text(found.model.config.to_json_string())
    active = statistics.fmean(float(layer.frequency.mean()) for layer in profile.layers)
    reuse = statistics.fmean(edge_model.reuse(layer, profile.shape.intermediate) for layer in profile.layers)
    print(f"active {active:.1%} of neurons per token; {reuse:.0%} of them in the token before, too", flush=True)
    (work / "done").touch()


def _run(arm: str, work: Path, settings: argparse.Namespace) -> dict[str, float] | None:
    tokens = settings.slow_tokens if arm in SLOW_ARMS else settings.pair_tokens if "/" in arm else settings.tokens
    command = [sys.executable, __file__, "--arm", arm, "--tokens", str(tokens)]
    command += ["--size", settings.size, "--work", settings.work, "--hardware", settings.hardware]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode != 0:
        print(f"{arm}: left out: {(done.stderr.strip().splitlines() or ['?'])[-1]}", flush=True)
        return None
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{arm}: {result}", flush=True)
    return result


def _row(arm: str, results: list[dict[str, float]]) -> dict[str, object]:
    """The repeat of median speed, and how far the others lie from it."""
    ranked = sorted(results, key=lambda one: one["tokens/s"])
    spread = {"repeats": len(ranked), "low": ranked[0]["tokens/s"], "high": ranked[-1]["tokens/s"]}
    return {"arm": arm} | ranked[len(ranked) // 2] | spread


def _child(settings: argparse.Namespace, work: Path) -> dict[str, float]:
    torch.set_num_threads(1)
    topics = edge_model.text(settings.size, WARM + settings.tokens, seed=7)
    if "/" in settings.arm:
        return _pair(work, topics, settings.arm.split(" / "))
    if settings.arm in EDGE:
        found = _edge(work, topics, *EDGE[settings.arm], is_stream=settings.arm == "stream")
        if settings.hardware and EDGE[settings.arm][2] == PLACED:
            with EdgeModel(open_bundle(work / EDGE[settings.arm][0], verify=False), None, PLACED) as model:
                planned = plan(model.needs, load(Path(settings.hardware)), int(found["budget MiB"] * 2**20), CONTEXT)
            found |= {"planned tokens/s": planned.tokens_per_s, "planned hit": planned.hit_rate}
        return found
    if settings.arm == DENSE:
        return _measured(_decoder(_dense(work, mapped=False)), topics, n_warm=8)
    _tiny()  # what the libraries allocate at first use
    resident = _numbers(work)["resident"]
    _drop_from_cache(work / "model.safetensors")  # pages of other processes are not counted against the limit
    limit = _memory(*OWN) + resident + MMAP[settings.arm] * _numbers(work)["ffn"]
    with _limited(int(limit)):
        return _measured(_decoder(_dense(work, mapped=True)), topics, n_warm=2)


def _edge(
    work: Path, ids: list[int], name: str, share: float | None, settings: RunSettings, is_stream: bool
) -> dict[str, float]:
    _tiny()
    budget = _budget(work, share)
    with _peak() as peak, _opened(work / name, budget, settings) as model:
        step: Callable[[int], object] = (lambda token: model._feed([token], False)) if is_stream else model.step
        activity = model.ffn.activity
        n_warm = 2 if settings.keeps is False else WARM
        for token in ids[WARM - n_warm : WARM]:
            step(token)
        hits, first = (activity.n_missing, activity.n_active), model.report()
        found = _measured(step, ids[WARM:], n_warm=0)
        n, report = len(ids) - WARM, model.report()
        n_active = activity.n_active - hits[1]
        assert not report.is_direct or report.read_bytes - first.read_bytes <= found["io MiB/token"] * 2**20 * n + 1
        return found | {
            "hit": 1 - (activity.n_missing - hits[0]) / n_active if n_active else 0.0,
            "reads/token": (report.n_reads - first.n_reads) / n,
            "budget MiB": report.memory.total / 2**20,
            "over": peak[0] / report.memory.total,
        }


def _pair(work: Path, ids: list[int], arms: list[str]) -> dict[str, float]:
    """How many times as fast the second arm is as the first, the two taking turns token by token."""
    _tiny()
    seconds = {arm: list[float]() for arm in arms}
    with contextlib.ExitStack() as stack:
        models = {}
        for arm in arms:
            name, share, settings = EDGE[arm]
            models[arm] = stack.enter_context(_opened(work / name, _budget(work, share), settings))
        for place, token in enumerate(ids):
            for arm in arms if place % 2 else arms[::-1]:
                started = time.perf_counter()
                models[arm].step(token)
                if place >= WARM:
                    seconds[arm].append(time.perf_counter() - started)
    one, other = seconds.values()
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return {"all tokens": sum(one) / sum(other), "median token": statistics.median(ratios)}


def _budget(work: Path, share: float | None) -> int | None:
    """Bytes for this share of the feed-forward layers beside what is always in memory; None is everything."""
    numbers = _numbers(work)
    return None if share is None else int(numbers["resident"] + share * numbers["ffn"])


@contextlib.contextmanager
def _opened(folder: Path, budget: int | None, settings: RunSettings) -> Iterator[EdgeModel]:
    """A bundle; without a budget everything of it is in memory already."""
    with EdgeModel(open_bundle(folder, verify=False), budget, settings) as model:
        if budget is None:
            model.forward([0, 1])
            model.reset()
        yield model


@contextlib.contextmanager
def _peak() -> Iterator[list[int]]:
    """The most memory so far above what is taken now, looked at by a thread beside this one."""
    before, peak, is_done = _memory(*OWN), [0], threading.Event()

    def look() -> None:
        while not is_done.wait(0.005):
            peak[0] = max(peak[0], _memory(*OWN) - before)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield peak
    finally:
        is_done.set()
        watcher.join()


def _measured(step: Callable[[int], object], ids: list[int], n_warm: int) -> dict[str, float]:
    for token in ids[:n_warm]:
        step(token)
    io, started, busy, seconds = _io(), time.perf_counter(), time.thread_time(), list[float]()
    for token in ids[n_warm:]:
        turn = time.perf_counter()
        step(token)
        seconds.append(time.perf_counter() - turn)
    n = len(ids) - n_warm
    return {
        "tokens/s": n / (time.perf_counter() - started),
        "cpu ms": (time.thread_time() - busy) / n * 1e3,
        "p50 ms": statistics.median(seconds) * 1e3,
        "p99 ms": sorted(seconds)[max(0, int(0.99 * n) - 1)] * 1e3,
        "io MiB/token": (_io() - io) / n / 2**20,
    }


def _dense(work: Path, mapped: bool) -> LlamaForCausalLM:
    """The model itself, loaded, or on mapped memory."""
    config = LlamaConfig.from_json_file(work / "config.json")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with safe_open(work / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model.load_state_dict(weights if mapped else {k: v.clone() for k, v in weights.items()}, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def _decoder(model: LlamaForCausalLM) -> Callable[[int], object]:
    past = None

    @torch.inference_mode()
    def step(token: int) -> None:
        nonlocal past
        past = model(torch.tensor([[token]]), past_key_values=past, use_cache=True).past_key_values

    return step


def _tiny() -> None:
    """Everything imported and used once, the compiled loops included."""
    loops, rows, x = kernels(torch.bfloat16), torch.zeros(8, 8, dtype=torch.bfloat16), torch.zeros(1, 8)
    if loops is not None:
        matrix = as_matrix(rows)
        loops.times(x, matrix)
        loops.mixed(x, matrix)
        loops.relu_neurons(x, matrix, matrix, matrix)
        loops.predicted(x, LayerPredictor("low_rank", rows, rows.T), True)
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.inference_mode():
        LlamaForCausalLM(LlamaConfig(vocab_size=64, **small))(torch.tensor([[1, 2]]))


def _numbers(work: Path) -> dict[str, float]:
    """Bytes of what is always in memory besides feed-forward layers (with keys and values), and of those."""
    manifest = open_bundle(work / "flat", verify=False).manifest
    config = LlamaConfig.from_json_file(work / "config.json")
    whole = (work / "model.safetensors").stat().st_size
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * CONTEXT * 2
    return {"resident": whole - manifest.ffn_bytes + kv, "ffn": manifest.ffn_bytes}


def _drop_from_cache(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


@contextlib.contextmanager
def _limited(n_bytes: int) -> Iterator[None]:
    """This process, page cache included, in so many bytes."""
    group = CGROUPS / f"winnow-bench-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(n_bytes))
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (CGROUPS / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def _memory(*fields: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(fields))


def _io() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


if __name__ == "__main__":
    main()
