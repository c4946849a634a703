"""The pictures of an edge export: how unevenly neurons are used, and what predictors make of it."""

from typing import TYPE_CHECKING

import duckdb

from storage.report.plots import Picture, legend_above
from storage.report.style import DASHES, MARKERS, SERIES, new_figure, settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LAYERS = 6

_CURVES = "SELECT layer, x, value FROM edge WHERE metric = 'frequency' ORDER BY ALL"
_FIGURES = "SELECT layer, metric, value FROM edge WHERE x IS NULL ORDER BY ALL"


def edge(connection: duckdb.DuckDBPyConnection) -> list[Picture]:
    """The hot/cold curve first; none for an export without neurons."""
    curves: dict[int, list[tuple[float, float]]] = {}
    for layer, x, value in connection.execute(_CURVES).fetchall():
        curves.setdefault(layer, []).append((x, value))
    figures: dict[int, dict[str, float]] = {}
    for layer, metric, value in connection.execute(_FIGURES).fetchall():
        figures.setdefault(layer, {})[metric] = value
    return [_hot_cold(curves), _predicted(figures)] if curves else []


def _hot_cold(curves: dict[int, list[tuple[float, float]]]) -> Picture:
    layers = sorted(curves)
    shown = sorted({layers[round(place * (len(layers) - 1) / (MAX_LAYERS - 1))] for place in range(MAX_LAYERS)})
    said = []
    with settings():
        figure, (axes,) = new_figure()
        for place, layer in enumerate(shown):
            x, y = zip(*curves[layer], strict=True)
            axes.plot(x, y, color=SERIES[place], linestyle=DASHES[place], lw=1.6, label=f"layer {layer}")
            often = max((share for share, value in curves[layer] if value >= 0.5), default=0.0)
            said.append(f"layer {layer}: {often:.0%} of the neurons are active in half of the tokens or more")
        axes.set(xlabel="share of the layer's neurons, the most active first", ylabel="share of tokens", ylim=(0, 1.02))
        legend_above(figure, axes)
    note = f"{len(shown)} of {len(layers)} layers." if len(shown) < len(layers) else ""
    return Picture("hot-cold", "How often neurons are active", f"Falling curves. {'; '.join(said)}.", note, figure)


def _predicted(figures: dict[int, dict[str, float]]) -> Picture:
    layers = sorted(figures)
    with settings():
        figure, (left, right) = new_figure(2)
        _line(left, layers, [figures[layer]["recall"] for layer in layers], ("recall", 0))
        lowest = min(one["recall"] for one in figures.values())
        left.set(title="active neurons that are predicted", xlabel="layer", ylim=(min(0.9, lowest - 0.02), 1.005))
        _line(right, layers, [figures[layer]["active"] for layer in layers], ("active", 0))
        _line(right, layers, [figures[layer]["predicted"] for layer in layers], ("predicted", 1))
        right.set(title="share of all neurons", xlabel="layer", ylim=(0, 1.02))
        legend_above(figure, right)
    said = "; ".join(
        f"layer {layer}: recall {one['recall']:.3f}, {one['active']:.0%} active, {one['predicted']:.0%} predicted"
        for layer, one in sorted(figures.items())
    )
    return Picture("recall", "What the predictors find", f"Points per layer. {said}.", "", figure)


def _line(axes: "Axes", x: list[int], y: list[float], style: tuple[str, int]) -> None:
    name, place = style
    axes.plot(x, y, MARKERS[place], color=SERIES[place], linestyle=DASHES[place], markersize=4, lw=1.0, label=name)
