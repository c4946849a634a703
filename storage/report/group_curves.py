"""What a training did to each group: curves of held-out data where there were looks at them, else of training's."""

import math
from collections.abc import Mapping, Sequence

import duckdb

from storage.report.plots import Picture, largest_groups, legend_above
from storage.report.queries import MAX_STEPS
from storage.report.style import DASHES, SERIES, label, new_figure, settings

PAIRS = {"loss": "loss", "rewards/accuracies": "accuracy", "weight": "weight"}
ANSWERS = {"truth": "truth", "reward": "reward", "kl": "KL", "weight": "weight"}
ALL = "all"
Curve = Sequence[tuple[int, float]]

# Every k-th entry of a long training. The weights only move in training.
_CURVES = """
WITH looks AS (SELECT COUNT(DISTINCT step) > 1 AS enough FROM training WHERE held_out),
shown AS (
    SELECT metric, COALESCE("group", $all) AS "group", step, value,
           ROW_NUMBER() OVER (PARTITION BY metric, "group" ORDER BY step) - 1 AS place,
           COUNT(*) OVER (PARTITION BY metric, "group") AS n
    FROM training, looks
    WHERE ("group" IS NOT NULL OR $with_all) AND isfinite(value) AND list_contains($metrics, metric)
      AND COALESCE(held_out, FALSE) = (enough AND metric <> 'weight')
)
SELECT metric, "group", step, value FROM shown WHERE place % CEIL(n / $max_steps)::BIGINT = 0 ORDER BY ALL
"""


def group_curves(connection: duckdb.DuckDBPyConnection) -> Picture | None:
    """Of a training on pairs; None for fewer than two groups."""
    found = _curves(connection, PAIRS, with_all=False)
    n_groups = len({group for curves in found.values() for group in curves})
    return _drawn("group-curves", "Groups in training", found, PAIRS) if n_groups > 1 else None


def answer_curves(connection: duckdb.DuckDBPyConnection) -> Picture | None:
    """Of an on-policy training, of all groups and each; None for any other training."""
    found = _curves(connection, ANSWERS, with_all=True)
    return _drawn("answer-curves", "Answers in training", found, ANSWERS) if "reward" in found else None


Curves = Mapping[str, Mapping[str, Curve]]  # by metric and group


def _curves(connection: duckdb.DuckDBPyConnection, names: Mapping[str, str], with_all: bool) -> Curves:
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    parameters = {"max_steps": MAX_STEPS, "metrics": list(names), "all": ALL, "with_all": with_all}
    for metric, group, step, value in connection.execute(_CURVES, parameters).fetchall():
        found.setdefault(metric, {}).setdefault(group, []).append((step, value))
    return found


def _drawn(key: str, title: str, found: Curves, names: Mapping[str, str]) -> Picture:
    """One facet per metric, one line per group."""
    sizes = {group: math.inf if group == ALL else len(c) for curves in found.values() for group, c in curves.items()}
    shown, note = largest_groups(sizes)
    shown.sort(key=lambda group: group != ALL)
    metrics = [metric for metric in names if metric in found]
    said = []
    with settings():
        figure, columns = new_figure(len(metrics), height=2.9, width=max(6.4, 2.8 * len(metrics) + 0.4))
        for axes, metric in zip(columns, metrics, strict=True):
            for place, group in enumerate(shown):
                curve = found[metric].get(group, [])
                steps, values = [step for step, _ in curve], [value for _, value in curve]
                axes.plot(steps, values, color=SERIES[place], linestyle=DASHES[place], lw=1.4, label=label(group))
                said += [f"{names[metric]} of {group}: {values[0]:.4g} to {values[-1]:.4g}"] if values else []
            axes.set_title(names[metric])
            axes.set_xlabel("step")
        legend_above(figure, columns[0])
    whole = f"{title}: {', '.join(names[metric] for metric in metrics)}"
    return Picture(key, whole, f"A line per group over the steps. {'; '.join(said)}.", note, figure)
