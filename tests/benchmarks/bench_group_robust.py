"""Does the group-robust reducer help the worst group where its authors say so (arXiv 2405.20304, section 5.1)?

    PYTHONPATH=. .venv/bin/python tests/benchmarks/bench_group_robust.py [--seeds 20] [--dpo-steps 3000]

Three data sets, DPO and IPO, plain mean, importance (IS) and robust (GR), 20 seeds; group_study.py says what they are.
The authors take 20,000 DPO steps. Writes bench-results/group_robust.json.
"""

from __future__ import annotations

import time
from typing import get_args

from group_study import Data, Outcome, train
from harness import interval, options, show

from runtime.alignment.groups import Reducer

FIRST_SEED = 2021


def main() -> None:
    settings = options(__doc__, seeds=20, dpo_steps=3000, ipo_steps=200)
    seeds = range(FIRST_SEED, FIRST_SEED + settings.seeds)
    rows: list[dict[str, object]] = []
    for data in get_args(Data):
        for method, n_steps in (("dpo", settings.dpo_steps), ("ipo", settings.ipo_steps)):
            before: Outcome | None = None
            arms: tuple[Reducer, ...] = ("mean", "importance", "robust")
            for reducer in arms:
                started = time.perf_counter()
                found = train(seeds, data, method, reducer, n_steps)
                rows.append({"data": data, "loss": method, "reducer": reducer} | _row(found, before))
                rows[-1]["s"] = time.perf_counter() - started
                before = found
    show("group_robust", settings, rows)


def _row(found: Outcome, before: Outcome | None) -> dict[str, object]:
    """Means over seeds; the change is to the arm above, with a bootstrap 95 % interval."""
    row: dict[str, object] = {
        "worst loss": found.worst.mean().item(),
        "mean loss": found.mean.mean().item(),
        "reward error": found.reward_error.mean().item(),
        "hard group's weight": found.hard_weight.mean().item(),
    }
    if before is not None:
        change = found.worst - before.worst
        low, high = interval(change.tolist())
        row["change"] = f"{change.mean().item():+.3f} ({low:+.3f}, {high:+.3f})"
        row["seeds better"] = int((change < -1e-9).sum())
    return row


if __name__ == "__main__":
    main()
