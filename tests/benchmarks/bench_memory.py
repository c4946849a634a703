"""Keys and values in use over time: Best-of-N against cuts when memory is full (Figure 1 of arXiv 2410.20290).

    .venv/bin/python tests/benchmarks/bench_memory.py [--n 512] [--budget-mb 80]

One prompt of the starter. Best-of-N has the same budget, and so fewer rows at a time: its candidates come in batches.
Writes bench-results/memory.json and memory.png.
"""

from __future__ import annotations

import resource

import torch
from harness import RESULTS, options, show
from starter_runs import Starter, prompts

from runtime.decoding.budget import Costs
from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutPolicy, CutSchedule, MemoryCuts
from runtime.decoding.sampling import SamplingConfig
from runtime.kv.arena import Arena, KVShape
from runtime.kv.passes import RowsPass


def main() -> None:
    settings = options(__doc__, n=512, budget_mb=80, alpha=0.5)
    starter = Starter.load(settings.device)
    budget = settings.budget_mb * 1_000_000
    per_token = KVShape.of(starter.policy.model).n_bytes(1, torch.float32)
    (prompt,) = prompts(0, 1)
    rows: list[dict[str, object]] = []
    curves: dict[str, list[float]] = {}
    for arm in ("best-of-N", "cuts when full"):
        is_cutting = arm != "best-of-N"
        cuts: CutPolicy = MemoryCuts(settings.alpha) if is_cutting else CutSchedule()
        # A batch of Best-of-N is as large as the budget allows for full answers.
        costs = Costs(SamplingConfig(n=1), 1, per_token, 0, 0, budget)
        fits = (budget - costs.prompt_bytes(64)) // costs.row_bytes
        n = settings.n if is_cutting else min(settings.n, fits)
        recorder = Recorder(per_token)
        with recorder:
            n_done = 0
            while n_done < settings.n:
                engine = Engine(
                    starter.policy, SamplingConfig(n=n, seed=n_done), cuts, starter.reward, n, kv_budget=budget
                )
                list(engine.generate([prompt]))
                n_done += n
        curves[arm] = recorder.used
        peak = max(recorder.used)
        rows.append(
            {
                "arm": arm,
                "rows at first": n,
                "steps": len(recorder.used),
                "budget MB": settings.budget_mb,
                "allocated MB": recorder.allocated / 1e6,
                "peak used MB": peak / 1e6,
                "mean used": sum(recorder.used) / len(recorder.used) / budget,
                "peak RSS MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
            }
        )
    show("memory", settings, rows)
    draw(curves, budget)


class Recorder:
    """Notes at every step how much of the policy's arena holds something."""

    def __init__(self, per_token: int) -> None:
        self.per_token, self.used, self.allocated = per_token, [0.0], 0
        self.original = RowsPass.__init__

    def __enter__(self) -> None:
        recorder, original = self, self.original

        def noted(self: RowsPass, arena: Arena, n_new: int, *args: object) -> None:
            original(self, arena, n_new, *args)  # type: ignore[arg-type]
            if n_new == 1:
                live = int(arena.row_tokens[: arena.n_rows].sum()) + sum(arena.prompt_lengths)
                recorder.used.append(live * recorder.per_token)
                recorder.allocated = max(recorder.allocated, arena.n_bytes)

        RowsPass.__init__ = noted  # type: ignore[method-assign, assignment]

    def __exit__(self, *error: object) -> None:
        RowsPass.__init__ = self.original  # type: ignore[method-assign]


def draw(curves: dict[str, list[float]], budget: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    for arm, used in curves.items():
        axes.plot([value / 1e6 for value in used], label=arm)
    axes.axhline(budget / 1e6, linestyle=":", color="grey", label="budget")
    axes.set(xlabel="decoding step", ylabel="MB of keys and values in use")
    axes.legend()
    figure.savefig(RESULTS / "memory.png", dpi=100)


if __name__ == "__main__":
    main()
