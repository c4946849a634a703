"""What the group benchmarks share: one arm, trained and measured on held-out pairs, and the table over seeds."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from runtime.alignment.config import OfflineConfig, Places
from runtime.alignment.figures import ALL
from runtime.alignment.groups import GroupSettings
from runtime.alignment.offline import PairRows, train_offline
from runtime.alignment.report import TrainingReport
from runtime.models import LoadedModel

Metrics = dict[str, float]  # figure -> value, of one trained model


def train_arm(loaded: LoadedModel, rows: PairRows, config: OfflineConfig, groups: GroupSettings) -> Metrics:
    """Train in place; held-out accuracy and loss of the groups and the worst one, last group weights, CPU seconds."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        places = Places(Path(folder) / "model", Path(folder) / "work")
        report = train_offline(loaded, rows, replace(config, groups=groups), places)
    assert not report.dropped and not report.held_out_dropped, (report.dropped, report.held_out_dropped)
    weights = {name: report.curve("weight", group=name) for name in report.groups if name != ALL}
    return {
        **_held_out(report),
        **{f"{name} weight": curve[-1] for name, curve in weights.items() if curve},
        "CPU seconds": time.process_time() - started,
    }


def _held_out(report: TrainingReport) -> Metrics:
    groups = {name: values for name, values in report.held_out.items() if name != ALL}
    if not groups:
        return {}
    accuracies = {name: values["rewards/accuracies"] for name, values in groups.items()}
    losses = {name: values["loss"] for name, values in groups.items()}
    return {
        "worst accuracy": min(accuracies.values()),
        "gap": max(accuracies.values()) - min(accuracies.values()),
        "mean accuracy": statistics.fmean(accuracies.values()),
        "worst loss": max(losses.values()),
        **{f"{name} accuracy": value for name, value in accuracies.items()},
        **{f"{name} loss": value for name, value in losses.items()},
    }


def over_seeds(seeds: Sequence[int], one_seed: Callable[[int], Mapping[str, Metrics]]) -> dict[str, list[Metrics]]:
    """Every arm's figures, seed by seed; each is printed at once, as a run takes minutes."""
    found: dict[str, list[Metrics]] = {}
    for seed in seeds:
        for arm, metrics in one_seed(seed).items():
            found.setdefault(arm, []).append(metrics)
            print(
                f"seed {seed}, {arm}:", ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()), flush=True
            )
    return found


def table(found: Mapping[str, Sequence[Metrics]], against: str) -> list[dict[str, object]]:
    """One row per figure; per arm the mean over seeds, every seed's value, and the mean change against one arm."""
    names = dict.fromkeys(name for runs in found.values() for name in runs[0])
    rows: list[dict[str, object]] = []
    for name in names:
        row: dict[str, object] = {"figure": name}
        for arm, runs in found.items():
            if name in runs[0]:
                values = [run[name] for run in runs]
                row[arm] = f"{statistics.fmean(values):.3f}"
                row[f"{arm}, seeds"] = " ".join(f"{value:.3f}" for value in values)
                if arm != against and name in found[against][0]:
                    row[f"{arm}, change"] = f"{statistics.fmean(values) - _mean(found[against], name):+.3f}"
        rows.append(row)
    return rows


def _mean(runs: Sequence[Metrics], name: str) -> float:
    return statistics.fmean(run[name] for run in runs)
