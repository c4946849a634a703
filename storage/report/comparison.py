"""Methods compared: a mark per method and group, with a line from its lowest seed to its highest; what each cost."""

import duckdb

from storage.report.plots import MAX_GROUPS, Picture
from storage.report.style import INK, MARKERS, SERIES, label, new_figure, settings

METRICS = {"truth": "truth of answers", "accuracy": "accuracy on held-out pairs"}
COSTS = {"seconds": "wall time, s", "tokens": "tokens"}
# The worst group is another one from seed to seed.
_FIGURES = """
WITH wanted AS (SELECT * FROM comparison WHERE metric IN ('truth', 'accuracy') AND "group" IS NOT NULL),
worst AS (SELECT metric, NULL AS "group", method, seed, MIN(value) AS value FROM wanted GROUP BY ALL),
costs AS (SELECT * FROM comparison WHERE metric IN ('seconds', 'tokens')),
every AS (
    SELECT metric, "group", method, seed, value FROM wanted UNION ALL SELECT * FROM worst
    UNION ALL SELECT metric, NULL, method, seed, value FROM costs
),
means AS (
    SELECT metric, "group", method, AVG(value) AS mean, MIN(value) AS lowest, MAX(value) AS highest
    FROM every GROUP BY ALL
)
SELECT * FROM means ORDER BY metric <> 'truth', metric <> 'accuracy', metric, "group" NULLS FIRST, method
"""
_METHODS = "SELECT method FROM comparison GROUP BY method ORDER BY MIN(seed) NULLS FIRST, method"


def comparison(connection: duckdb.DuckDBPyConnection) -> Picture | None:
    """One facet per metric and per cost; None where no group was measured."""
    found = connection.execute(_FIGURES).fetchall()
    groups: list[str | None] = list(dict.fromkeys(group for metric, group, *_ in found if metric in METRICS))
    if not groups:
        return None
    methods = [method for (method,) in connection.execute(_METHODS).fetchall()][: len(SERIES)]
    groups = groups[:MAX_GROUPS]
    names = METRICS | COSTS
    metrics = [metric for metric in names if any(metric == name for name, *_ in found)]
    shown = {(m, g, method): values for m, g, method, *values in found if method in methods and g in [None, *groups]}
    with settings():
        height = 1.2 + 0.09 * len(groups) * (len(methods) + 2)
        figure, columns = new_figure(len(metrics), height=max(2.6, height), width=max(6.4, 3.0 * len(metrics)))
        step = 0.8 / len(methods)
        for axes, metric in zip(columns, metrics, strict=True):
            for (name, group, method), (mean, low, high) in shown.items():
                if name == metric:
                    place = methods.index(method)
                    # Of what a method cost there is one figure: its mark has a row to itself.
                    row = -place if metric in COSTS else len(groups) - groups.index(group) + 0.4 - step * (place + 0.5)
                    axes.plot([low, high], [row, row], color=SERIES[place], linewidth=1.4)
                    axes.plot(mean, row, MARKERS[place], color=SERIES[place], markersize=5, label=label(method))
            ticks = ["worst group" if group is None else label(group) for group in groups]
            if metric in METRICS:
                axes.set_yticks(range(len(groups), 0, -1), ticks if axes is columns[0] else [""] * len(groups))
            else:
                axes.set_yticks([])
                axes.set_ylim(-len(methods), 1)
                axes.set_xlim(left=0)
            axes.set_title(names[metric])
        handles = {text: handle for handle, text in zip(*columns[0].get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=3, labelcolor=INK)
    note = "" if len(shown) == len(found) else "The first methods and groups; the table has all."
    return Picture("comparison", "Methods compared", f"A mark per method. {_said(shown)}.", note, figure)


def _said(shown: dict[tuple[str, str | None, str], list[float]]) -> str:
    """What is drawn, in words."""
    parts = []
    for (metric, group, method), (mean, low, high) in shown.items():
        of = "" if metric in COSTS else f" of {group or 'the worst group'}"
        parts.append(f"{COSTS.get(metric, metric)}{of} with {method}: {mean:.4g} ({low:.4g} to {high:.4g})")
    return "; ".join(parts)
