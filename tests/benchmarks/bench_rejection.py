"""Speculative rejection against Best-of-N on the same engine: tokens, time, and the winner's score, on the starter.

    .venv/bin/python tests/benchmarks/bench_rejection.py [--n 64 256] [--prompts 40] [--device cuda]

The schedule comes from a calibration on other prompts. Noise is keyed by candidate, so the rows that survive are the
same rows. Gain: the winner's score over the mean score of one sample, as a share of what Best-of-N gains; its interval
is a bootstrap over prompts. Improvement is the paper's score (arXiv 2410.20290): 100 is Best-of-N.
"""

from __future__ import annotations

import statistics

from harness import interval, options, show
from starter_runs import Starter, calibrated, measure, prompts

from runtime.decoding.rejection import CutPolicy, CutSchedule


def main() -> None:
    settings = options(__doc__, n=[64, 256], prompts=40, calibration_prompts=24, retained=0.995)
    starter = Starter.load(settings.device)
    rows: list[dict[str, object]] = []
    for n in settings.n:
        asked = prompts(settings.calibration_prompts, settings.prompts)
        found = calibrated(starter, prompts(0, settings.calibration_prompts), n, settings.retained)
        print(f"N={n}: cuts at {list(found.tokens)} tokens keep {list(found.keep)}")
        arms: dict[str, CutPolicy] = {"best-of-N": CutSchedule(), "rejection": CutSchedule(found.tokens, found.keep)}
        runs = {arm: [measure(starter, starter.engine(n, cuts), asked[:2])] for arm, cuts in arms.items()}  # warm-up
        for _ in range(settings.repeats):
            for arm, cuts in arms.items():
                runs[arm].append(measure(starter, starter.engine(n, cuts), asked))
        full, cut = runs["best-of-N"][-1], runs["rejection"][-1]
        means = [statistics.fmean(scores) for scores in full.all_scores]
        gains = [best - mean for best, mean in zip(full.best, means, strict=True)]
        kept = [best - mean for best, mean in zip(cut.best, means, strict=True)]
        share = statistics.fmean(kept) / statistics.fmean(gains)
        low, high = interval([k / statistics.fmean(gains) for k in kept])
        spreads = [max(scores) - min(scores) for scores in full.all_scores]
        lost = [(a - b) / spread for a, b, spread in zip(cut.best, full.best, spreads, strict=True) if spread > 0]
        seconds = {arm: statistics.median(run.seconds for run in runs[arm][1:]) for arm in arms}
        for arm, run in (("best-of-N", full), ("rejection", cut)):
            is_cut = arm == "rejection"
            rows.append(
                {
                    "n": n,
                    "arm": arm,
                    "tokens": run.tokens,
                    "seconds": seconds[arm],
                    "x tokens": run.tokens / full.tokens,
                    "x seconds": seconds[arm] / seconds["best-of-N"],
                    "score of best": statistics.fmean(run.best),
                    "gain": share if is_cut else 1.0,
                    "95 %": f"{low:.3f} to {high:.3f}" if is_cut else None,
                    "improvement": 100 * (1 + statistics.fmean(lost)) if is_cut else 100.0,
                    "truth": statistics.fmean(run.truths),
                }
            )
    show("rejection", settings, rows)


if __name__ == "__main__":
    main()
