"""Best-of-N with and without speculative rejection: tokens, time and the winner's score, on the starter.

    .venv/bin/python tests/benchmarks/bench_rejection.py [--prompts 24] [--n 16 64] [--device cuda]

Both arms run the same engine in the same process, alternating; noise is keyed by candidate, so the rows that survive
are the same rows. Prints a table and writes bench-results/rejection.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutSchedule
from runtime.decoding.sampling import SamplingConfig
from runtime.models import load_classifier, load_policy
from runtime.records import Message, Prompt
from runtime.rewards.classifier import ClassifierReward
from runtime.starter import path, prompts_path
from runtime.starter.rule import truth

ARMS = {
    "best-of-N": CutSchedule((), ()),
    "rejection": CutSchedule((6, 16, 32), (0.35, 0.15, 0.5)),
}
OUTPUT = Path("bench-results/rejection.json")


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    prompts = _prompts(options.prompts)
    policy = load_policy(str(path("policy")), device=options.device)
    reward = ClassifierReward(load_classifier(str(path("reward")), device=options.device), "chat")
    rows = []
    for n in options.n:
        runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for _ in range(options.repeats + 1):  # the first repeat warms up and is dropped
            for arm, cuts in ARMS.items():
                engine = Engine(policy, SamplingConfig(n=n), cuts, reward, max(128, n), "chat")
                runs[arm].append(_measure(engine, reward, prompts))
        rows += [{"n": n, "arm": arm} | _median(runs[arm][1:]) for arm in ARMS]
    _print(rows)
    OUTPUT.parent.mkdir(exist_ok=True)
    machine = {"machine": platform.machine(), "threads": options.threads, "device": options.device}
    OUTPUT.write_text(json.dumps({"settings": vars(options), "machine": machine, "rows": rows}, indent=2))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--n", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def _prompts(count: int) -> list[Prompt]:
    rows = [json.loads(line) for line in prompts_path().read_text().splitlines()[:count]]
    return [
        Prompt(f"bench-{i}", (Message("user", row["messages"][0]["content"]),), row["group"], row["reference"])
        for i, row in enumerate(rows)
    ]


def _measure(engine: Engine, reward: ClassifierReward, prompts: list[Prompt]) -> dict[str, float]:
    """One run: decode, score the finished answers, take each prompt's best; seconds include all of it."""
    started = time.perf_counter()
    answers = list(engine.generate(prompts))
    best_scores, best_truths = [], []
    for prompt, candidates in zip(prompts, answers, strict=True):
        finished = [c for c in candidates if c.finish_reason in ("eos", "length")]
        scores = [s.value for s in reward.score([prompt] * len(finished), [c.response for c in finished])]
        best = max(range(len(finished)), key=lambda i: scores[i])
        best_scores.append(scores[best])
        best_truths.append(truth(prompt, finished[best].response))
    seconds = time.perf_counter() - started
    tokens = sum(c.n_tokens for candidates in answers for c in candidates)
    return {
        "seconds": seconds,
        "tokens": tokens,
        "best_score": statistics.mean(best_scores),
        "truth_of_best": statistics.mean(best_truths),
    }


def _median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def _print(rows: list[dict[str, float]]) -> None:
    print(f"{'N':>4} {'arm':10} {'seconds':>8} {'tokens':>8} {'score of best':>14} {'truth of best':>14}")
    for row in rows:
        print(
            f"{row['n']:>4} {row['arm']:10} {row['seconds']:8.2f} {row['tokens']:8.0f} "
            f"{row['best_score']:14.3f} {row['truth_of_best']:14.3f}"
        )
    for full, cut in zip(rows[0::2], rows[1::2], strict=True):
        print(
            f"N={full['n']}: rejection takes {cut['tokens'] / full['tokens']:.2f}x the tokens "
            f"and {cut['seconds'] / full['seconds']:.2f}x the time of best-of-N"
        )


if __name__ == "__main__":
    main()
