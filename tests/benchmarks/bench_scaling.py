"""Cost per token as prompts and candidates grow, and the arena's memory, on the starter.

    .venv/bin/python tests/benchmarks/bench_scaling.py [--prompts 10 100 1000] [--n 16 64 256 1024]

Prompts grow at N = 16 with 32 rows; N grows at 4 prompts with 256 rows, or N where that is more. No cuts.
"""

from __future__ import annotations

import statistics
import time

from harness import options, show
from starter_runs import Starter, prompts

from runtime.decoding.rejection import CutSchedule


def main() -> None:
    settings = options(__doc__, prompts=[10, 100, 1000], n=[16, 64, 256, 1024])
    starter = Starter.load(settings.device)
    rows: list[dict[str, object]] = []
    cases = [("prompts", count, 16, 32) for count in settings.prompts]
    cases += [("n", 4, n, max(256, n)) for n in settings.n]
    list(starter.engine(8, CutSchedule(), 64).generate(prompts(0, 10)))
    for axis, n_prompts, n, max_rows in cases:
        costs = []
        for _ in range(settings.repeats):
            started = time.perf_counter()
            answers = list(starter.engine(n, CutSchedule(), max_rows).generate(prompts(0, n_prompts)))
            tokens = sum(c.n_tokens for candidates in answers for c in candidates)
            costs.append(1e6 * (time.perf_counter() - started) / tokens)
        cost = statistics.median(costs)
        rows.append({"grows": axis, "prompts": n_prompts, "n": n, "rows": max_rows, "us per token": cost})
    for axis in ("prompts", "n"):
        mine = [row for row in rows if row["grows"] == axis]
        for row in mine:
            row["x first"] = float(str(row["us per token"])) / float(str(mine[0]["us per token"]))
    show("scaling", settings, rows)


if __name__ == "__main__":
    main()
