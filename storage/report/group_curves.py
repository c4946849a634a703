"""What a training did to each group: curves of loss, accuracy and weight, on held-out pairs where there were looks."""

from collections.abc import Sequence

import duckdb

from storage.report.plots import Picture, largest_groups, legend_above
from storage.report.queries import MAX_STEPS
from storage.report.style import DASHES, SERIES, label, new_figure, settings

METRICS = {"loss": "loss", "rewards/accuracies": "accuracy", "weight": "weight"}
Curve = Sequence[tuple[int, float]]

# Every k-th entry of a long training. The weights only move in training.
_CURVES = """
WITH looks AS (SELECT COUNT(DISTINCT step) > 1 AS enough FROM training WHERE held_out),
shown AS (
    SELECT metric, "group", step, value,
           ROW_NUMBER() OVER (PARTITION BY metric, "group" ORDER BY step) - 1 AS place,
           COUNT(*) OVER (PARTITION BY metric, "group") AS n
    FROM training, looks
    WHERE "group" IS NOT NULL AND isfinite(value) AND metric IN ('loss', 'rewards/accuracies', 'weight')
      AND COALESCE(held_out, FALSE) = (enough AND metric <> 'weight')
)
SELECT metric, "group", step, value FROM shown WHERE place % CEIL(n / $max_steps)::BIGINT = 0 ORDER BY ALL
"""


def group_curves(connection: duckdb.DuckDBPyConnection) -> Picture | None:
    """One facet per metric, one line per group; None for fewer than two groups."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for metric, group, step, value in connection.execute(_CURVES, {"max_steps": MAX_STEPS}).fetchall():
        found.setdefault(metric, {}).setdefault(group, []).append((step, value))
    sizes = {group: len(curve) for curves in found.values() for group, curve in curves.items()}
    if len(sizes) < 2:
        return None
    shown, note = largest_groups(sizes)
    metrics = [metric for metric in METRICS if metric in found]
    said = []
    with settings():
        figure, columns = new_figure(len(metrics), height=2.9, width=max(6.4, 2.8 * len(metrics) + 0.4))
        for axes, metric in zip(columns, metrics, strict=True):
            for place, group in enumerate(shown):
                curve = found[metric].get(group, [])
                steps, values = [step for step, _ in curve], [value for _, value in curve]
                axes.plot(steps, values, color=SERIES[place], linestyle=DASHES[place], lw=1.4, label=label(group))
                said += [f"{METRICS[metric]} of {group}: {values[0]:.4g} to {values[-1]:.4g}"] if values else []
            axes.set_title(METRICS[metric])
            axes.set_xlabel("step")
        legend_above(figure, columns[0])
    title = f"Groups in training: {', '.join(METRICS[metric] for metric in metrics)}"
    return Picture("group-curves", title, f"A line per group over the steps. {'; '.join(said)}.", note, figure)
