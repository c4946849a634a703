"""The figures of a comparison: rows of its table, means and spreads over seeds, and the table that people read."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import pyarrow as pa
from pydantic import JsonValue

from tasks.artifacts import Cell
from tasks.groups import ALL, GAP, WORST, group_shown_as, shown_group

START = "start"  # the model that all methods started from, as a column beside them
# Figures of a training as a whole.
COSTS = ("steps", "tokens", "seconds")
HELD_OUT = ("loss", "accuracy", "margin", "kl_per_token")
# What is shown, best known first. The worst group has the largest loss, but the smallest of the others.
SHOWN = ("truth", "accuracy", "loss")
HIGHER_IS_BETTER = {"truth": True, "accuracy": True, "loss": False}

Row = dict[str, object]


def training_rows(stats: Mapping[str, JsonValue], known: Mapping[str, object]) -> list[Row]:
    """From the statistics of a fine-tuning: held-out figures per group, and what it cost."""
    rows = [_row(known, None, name, stats[name]) for name in COSTS if name in stats]
    held_out = cast(Mapping[str, Mapping[str, JsonValue]], stats.get("held_out", {}))
    for group, values in held_out.items():
        rows += [_row(known, group_shown_as(group), name, values[name]) for name in HELD_OUT if name in values]
    return rows


def answer_rows(metrics: pa.Table, known: Mapping[str, object], which: str = "after") -> list[Row]:
    """From the metrics of an evaluation, those of one of its models."""
    return [
        _row(known, group_shown_as(row["group"]), row["metric"], row["value"])
        for row in metrics.to_pylist()
        if row["model"] == which
    ]


def start_rows(metrics: pa.Table, model: str) -> list[Row]:
    """Likewise of the model before any training."""
    return answer_rows(metrics, {"method": START, "seed": None, "model": model}, "before")


def summary(rows: Sequence[Mapping[str, object]]) -> list[dict[str, JsonValue]]:
    """Mean and spread over seeds of each method's figures; `worst` and `gap` are taken per seed first."""
    values: dict[tuple[str, str, str], dict[object, float]] = {}
    for row in rows:
        key = (str(row["method"]), str(row["metric"]), shown_group(cast(str | None, row["group"])))
        values.setdefault(key, {})[row["seed"]] = cast(float, row["value"])
    for (method, metric, group), by_seed in _extremes(rows).items():
        values[method, metric, group] = by_seed
    return [
        {"metric": metric, "group": group, "method": method, **_over_seeds(list(by_seed.values()))}
        for (method, metric, group), by_seed in values.items()
    ]


def overview(figures: Iterable[Mapping[str, JsonValue]]) -> list[dict[str, Cell]]:
    """One row per figure and group, one column per method: mean and standard deviation over seeds."""
    cells = {(f["metric"], f["group"], f["method"]): f for f in figures}
    methods = sorted({str(method) for *_, method in cells}, key=[m for *_, m in cells].index)
    methods.sort(key=lambda method: method != START)
    rows: list[dict[str, Cell]] = []
    for metric in (*SHOWN, "tokens", "seconds"):
        for group in _order([str(group) for name, group, _ in cells if name == metric]):
            row: dict[str, Cell] = {"figure": metric, "group": "" if metric in COSTS else group}
            rows.append(row | {method: _shown(cells.get((metric, group, method))) for method in methods})
    return rows


def _row(known: Mapping[str, object], group: str | None, metric: str, value: object) -> Row:
    return {**known, "group": group, "metric": metric, "value": float(cast(float, value))}


def _extremes(rows: Sequence[Mapping[str, object]]) -> dict[tuple[str, str, str], dict[object, float]]:
    """(method, metric, worst or gap) -> seed -> value, where there are groups."""
    groups: dict[tuple[str, str, object], list[float]] = {}
    for row in rows:
        if row["group"] is not None and row["metric"] in HIGHER_IS_BETTER:
            key = (str(row["method"]), str(row["metric"]), row["seed"])
            groups.setdefault(key, []).append(cast(float, row["value"]))
    found: dict[tuple[str, str, str], dict[object, float]] = {}
    for (method, metric, seed), values in groups.items():
        worst = min(values) if HIGHER_IS_BETTER[metric] else max(values)
        found.setdefault((method, metric, WORST), {})[seed] = worst
        found.setdefault((method, metric, GAP), {})[seed] = max(values) - min(values)
    return found


def _over_seeds(values: Sequence[float]) -> dict[str, JsonValue]:
    spread = round(statistics.stdev(values), 6) if len(values) > 1 else None
    return {"mean": round(statistics.fmean(values), 6), "spread": spread, "seeds": len(values)}


def _order(groups: Sequence[str]) -> list[str]:
    """Worst, gap and all first, then the groups."""
    first = (WORST, GAP, ALL)
    return [g for g in first if g in groups] + sorted(set(groups) - set(first))


def _shown(figure: Mapping[str, JsonValue] | None) -> str | None:
    if figure is None:
        return None
    mean, spread = cast(float, figure["mean"]), cast(float | None, figure["spread"])
    return f"{mean:.4g}" if spread is None else f"{mean:.4g} ± {spread:.2g}"
