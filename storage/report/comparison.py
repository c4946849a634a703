"""Methods compared: a mark per method and group, with a line from its lowest seed to its highest."""

import duckdb

from storage.report.plots import MAX_GROUPS, Picture
from storage.report.style import INK, MARKERS, SERIES, label, new_figure, settings

METRICS = {"truth": "truth of answers", "accuracy": "accuracy on held-out pairs"}
# The worst group is another one from seed to seed.
_FIGURES = """
WITH wanted AS (SELECT * FROM comparison WHERE metric IN ('truth', 'accuracy') AND "group" IS NOT NULL),
worst AS (SELECT metric, NULL AS "group", method, seed, MIN(value) AS value FROM wanted GROUP BY ALL),
every AS (SELECT metric, "group", method, seed, value FROM wanted UNION ALL SELECT * FROM worst),
means AS (
    SELECT metric, "group", method, AVG(value) AS mean, MIN(value) AS lowest, MAX(value) AS highest
    FROM every GROUP BY ALL
)
SELECT * FROM means ORDER BY metric <> 'truth', "group" NULLS FIRST, method
"""
_METHODS = "SELECT method FROM comparison GROUP BY method ORDER BY MIN(seed) NULLS FIRST, method"


def comparison(connection: duckdb.DuckDBPyConnection) -> Picture | None:
    """One facet per metric; None where no group was measured."""
    found = connection.execute(_FIGURES).fetchall()
    if not found:
        return None
    methods = [method for (method,) in connection.execute(_METHODS).fetchall()][: len(SERIES)]
    groups: list[str | None] = list(dict.fromkeys(group for _, group, *_ in found))[:MAX_GROUPS]
    metrics = [metric for metric in METRICS if any(metric == name for name, *_ in found)]
    shown = {(m, g, method): values for m, g, method, *values in found if method in methods and g in groups}
    with settings():
        height = 1.2 + 0.09 * len(groups) * (len(methods) + 2)
        figure, columns = new_figure(len(metrics), height=max(2.6, height), width=max(6.4, 3.6 * len(metrics)))
        step = 0.8 / len(methods)
        for axes, metric in zip(columns, metrics, strict=True):
            for (name, group, method), (mean, low, high) in shown.items():
                if name == metric:
                    place = methods.index(method)
                    row = len(groups) - groups.index(group) + 0.4 - step * (place + 0.5)
                    axes.plot([low, high], [row, row], color=SERIES[place], linewidth=1.4)
                    axes.plot(mean, row, MARKERS[place], color=SERIES[place], markersize=5, label=label(method))
            names = ["worst group" if group is None else label(group) for group in groups]
            axes.set_yticks(range(len(groups), 0, -1), names if axes is columns[0] else [""] * len(groups))
            axes.set_title(METRICS[metric])
        handles = {text: handle for handle, text in zip(*columns[0].get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=3, labelcolor=INK)
    said = "; ".join(
        f"{metric} of {group or 'the worst group'} with {method}: {mean:.4g} ({low:.4g} to {high:.4g})"
        for (metric, group, method), (mean, low, high) in shown.items()
    )
    note = "" if len(shown) == len(found) else "The first methods and groups; the table has all."
    return Picture("comparison", "Methods compared", f"A mark per method. {said}.", note, figure)
