"""Speculative rejection against Best-of-N on the same engine: tokens, time, and the winner's score, on the starter.

    .venv/bin/python tests/benchmarks/bench_rejection.py [--n 64 256] [--prompts 40] [--device cuda]

The schedules come from a calibration on other prompts, at N = `--calibration-n`, which asks for a share of the gain
to be retained there. Noise is keyed by candidate, so the rows that survive are the same rows. Gain: the winner's score
over the mean score of one sample, as a share of what Best-of-N gains; its interval is a bootstrap over prompts.
Improvement is the paper's score (arXiv 2410.20290): 100 is Best-of-N.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from harness import interval, options, show
from starter_runs import Run, Starter, calibrated, measure, prompts

from runtime.decoding.rejection import CutPolicy, CutSchedule


def main() -> None:
    settings = options(
        __doc__, n=[64, 256], prompts=40, calibration_prompts=120, calibration_n=64, retained=[0.95, 0.98]
    )
    starter = Starter.load(settings.device)
    measured_on = prompts(0, settings.calibration_prompts)
    arms: dict[str, CutPolicy] = {"best-of-N": CutSchedule()}
    for retained in settings.retained:
        found = calibrated(starter, measured_on, settings.calibration_n, retained)
        print(f"{retained:.1%} on the calibration: cuts at {list(found.tokens)} tokens keep {list(found.keep)}")
        arms[f"rejection {retained:.1%}"] = CutSchedule(found.tokens, found.keep)
    asked = prompts(settings.calibration_prompts, settings.prompts)
    rows: list[dict[str, object]] = []
    for n in settings.n:
        runs = {arm: [measure(starter, starter.engine(n, cuts), asked[:2])] for arm, cuts in arms.items()}  # warm-up
        for _ in range(settings.repeats):
            for arm, cuts in arms.items():
                runs[arm].append(measure(starter, starter.engine(n, cuts), asked))
        full = runs["best-of-N"]
        rows += [{"n": n, "arm": arm} | compare(found, full) for arm, found in runs.items()]
    show("rejection", settings, rows)


def compare(runs: Sequence[Run], full_runs: Sequence[Run]) -> dict[str, object]:
    """Of one arm, beside Best-of-N; the first run of each was the warm-up."""
    run, full = runs[-1], full_runs[-1]
    seconds, full_seconds = (statistics.median(one.seconds for one in many[1:]) for many in (runs, full_runs))
    means = [statistics.fmean(scores) for scores in full.all_scores]
    gain = statistics.fmean(best - mean for best, mean in zip(full.best, means, strict=True))
    kept = [(best - mean) / gain for best, mean in zip(run.best, means, strict=True)]
    lost = [(best - other) / gain for best, other in zip(run.best, full.best, strict=True)]
    low, high = interval([1 + one for one in lost])
    spreads = [max(scores) - min(scores) for scores in full.all_scores]
    relative = [(a - b) / s for a, b, s in zip(run.best, full.best, spreads, strict=True) if s > 0]
    return {
        "tokens": run.tokens,
        "seconds": seconds,
        "x tokens": run.tokens / full.tokens,
        "x seconds": seconds / full_seconds,
        "score": statistics.fmean(run.best),
        "gain": statistics.fmean(kept),
        "95 %": f"{low:.3f} to {high:.3f}",
        "improvement": 100 * (1 + statistics.fmean(relative)),
        "truth": statistics.fmean(run.truths),
    }


if __name__ == "__main__":
    main()
