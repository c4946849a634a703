"""The pictures of a report: each from counted or sampled data, with its text for those who cannot see it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage.histogram import Histogram
from storage.report.queries import Points
from storage.report.style import DASHES, INK, MARKERS, MUTED, SERIES, label, new_figure, settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CURVES = 12
MAX_METRICS = 4
MAX_GROUPS = 12


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure with what stands around it; `alt` says what it shows."""

    key: str
    title: str
    alt: str
    caption: str
    figure: "Figure"


def distribution(key: str, title: str, unit: str, found: Histogram | None) -> Picture | None:
    """One outline per group: the share of its values in each bin."""
    if found is None:
        return None
    shown, note = largest_groups({group: sum(counts) for group, counts in found.counts.items()})
    said = []
    with settings():
        figure, (axes,) = new_figure()
        for place, group in enumerate(shown):
            counts = found.counts[group]
            shares = [count / sum(counts) for count in counts]
            axes.stairs(
                shares, found.edges, color=SERIES[place], linestyle=DASHES[place], linewidth=1.8, label=label(group)
            )
            most = counts.index(max(counts))
            said.append(f"{group}: {sum(counts)}, most often {found.edges[most]:g} to {found.edges[most + 1]:g}")
        axes.set(xlabel=unit, ylabel="share of the group", ylim=(0, None))
        legend_above(figure, axes)
    return Picture(key, title, f"{title}, as outlines of histograms. {'; '.join(said)}.", note, figure)


def scatter(key: str, title: str, facets: Mapping[str, Points], axis_names: tuple[str, str]) -> Picture | None:
    """Points per group, one facet each; the correlation over all rows stands above."""
    filled = {name: points for name, points in facets.items() if points.x}
    if not filled:
        return None
    sizes = {group: sum(p.groups.count(group) for p in filled.values()) for p in filled.values() for group in p.groups}
    shown, note = largest_groups(sizes)
    said = []
    with settings():
        figure, columns = new_figure(len(filled), height=3.1, width=max(6.4, 3.0 * len(filled)))
        for axes, (name, points) in zip(columns, filled.items(), strict=True):
            _points(axes, points, shown)
            pearson = "" if points.pearson is None else f"r = {points.pearson:.2f}, "
            axes.set_title(f"{name}{', ' if name else ''}{pearson}n = {points.n}")
            axes.set_xlabel(axis_names[0])
            said.append(f"{name or title}: {pearson}{points.n} answers, {len(points.x)} of them drawn")
        columns[0].set_ylabel(axis_names[1])
        legend_above(figure, columns[0])
    return Picture(key, title, f"{title}, as points. {'; '.join(said)}.", note, figure)


def tokens(rows: Sequence[tuple[str, int, float]]) -> Picture | None:
    """Bars per group: tokens decoded, and beside them what cuts saved."""
    if not rows or not sum(decoded for _, decoded, _ in rows):
        return None
    shown, note = largest_groups({group: decoded for group, decoded, _ in rows})
    bars = [row for row in rows if row[0] in shown]
    said = [f"{g}: {d} decoded, {round(s)} saved ({s / (d + s):.0%})" for g, d, s in bars if d + s]
    with settings():
        figure, (axes,) = new_figure(height=1.1 + 0.45 * len(bars))
        places = list(range(len(bars)))[::-1]
        decoded, saved = [d for _, d, _ in bars], [s for *_, s in bars]
        axes.barh(places, decoded, color=SERIES[0], height=0.6, label="decoded")
        kept = {"color": "none", "edgecolor": SERIES[1], "hatch": "////", "height": 0.6}
        axes.barh(places, saved, left=decoded, label="saved by cuts (estimate)", **kept)  # type: ignore[arg-type]
        axes.set_yticks(places, [label(group) for group, *_ in bars])
        axes.set_xlabel("tokens")
        axes.grid(False, axis="y")
        legend_above(figure, axes)
    caption = (
        "What a cut answer would still have cost is estimated by the mean length of its prompt's finished answers."
    )
    return Picture("tokens", "Tokens with and without cuts", f"Bars. {'; '.join(said)}.", f"{caption} {note}", figure)


def drops(rows: Sequence[tuple[str, str, int]]) -> Picture | None:
    """Bars per group, one part per reason."""
    if not rows:
        return None
    sizes: dict[str, int] = {}
    for group, _, count in rows:
        sizes[group] = sizes.get(group, 0) + count
    shown, note = largest_groups(sizes)
    reasons = sorted({reason for _, reason, _ in rows})
    kept = reasons[: len(SERIES)]
    counts = {(group, reason): count for group, reason, count in rows}
    with settings():
        figure, (axes,) = new_figure(height=1.1 + 0.45 * len(shown))
        places = list(range(len(shown)))[::-1]
        start = [0] * len(shown)
        for place, reason in enumerate(kept):
            values = [counts.get((group, reason), 0) for group in shown]
            axes.barh(places, values, left=start, color=SERIES[place], height=0.6, label=label(reason))
            start = [a + b for a, b in zip(start, values, strict=True)]
        axes.set_yticks(places, [label(group) for group in shown])
        axes.set_xlabel("rows dropped")
        axes.grid(False, axis="y")
        legend_above(figure, axes)
    if len(kept) < len(reasons):
        note += f" The first {len(kept)} of {len(reasons)} reasons; the table below has all."
    said = "; ".join(f"{group}: {count} {reason}" for group, reason, count in rows if group in shown)
    return Picture("drops", "Dropped rows by reason", f"Bars. {said}.", note, figure)


def before_after(rows: Sequence[tuple[str, str, float | None, float | None, int]]) -> Picture | None:
    """Rows of (group, metric, before, after, answers): a line from before to after, one facet per metric."""
    ends = {
        (metric, group): (before, after)
        for group, metric, before, after, _ in rows
        if before is not None and after is not None and metric not in ("errors", "unfinished")
    }
    metrics = list(dict.fromkeys(metric for metric, _ in ends))[:MAX_METRICS]
    groups = list(dict.fromkeys(group for _, group in ends))[:MAX_GROUPS]
    if not ends:
        return None
    with settings():
        figure, columns = new_figure(len(metrics), height=1.3 + 0.32 * len(groups), width=max(6.4, 2.6 * len(metrics)))
        places = {group: len(groups) - index for index, group in enumerate(groups)}
        for axes, metric in zip(columns, metrics, strict=True):
            for group, place in places.items():
                if (metric, group) in ends:
                    _dumbbell(axes, ends[metric, group], place)
            axes.set_title(label(metric))
            axes.set_ylim(0.4, len(groups) + 0.6)
            axes.set_yticks(list(places.values()), [label(group) if axes is columns[0] else "" for group in places])
        _model_legend(figure)
    said = "; ".join(f"{m} {g}: {before:.4g} to {after:.4g}" for (m, g), (before, after) in ends.items())
    is_short = len({g for _, g in ends}) > len(groups) or len({m for m, _ in ends}) > len(metrics)
    caption = f"The first {len(metrics)} metrics and {len(groups)} groups; the table has all." if is_short else ""
    title = "Held-out prompts before and after"
    return Picture("before-after", title, f"A mark before and one after, joined. {said}.", caption, figure)


def curves(found: Mapping[str, Sequence[tuple[int, float]]]) -> list[Picture]:
    """A picture of up to three training metrics at a time, the loss first."""
    every = sorted(found, key=lambda name: (name != "loss", "rewards" not in name, name))
    names = every[:MAX_CURVES]
    note = f"The first {len(names)} of {len(every)} metrics." if len(names) < len(every) else ""
    pictures = []
    for start in range(0, len(names), 3):
        part = names[start : start + 3]
        with settings():
            figure, columns = new_figure(len(part), height=2.3, width=2.8 * len(part) + 0.4)
            for axes, name in zip(columns, part, strict=True):
                marker = "." if len(found[name]) < 8 else ""
                axes.plot(
                    [s for s, _ in found[name]], [v for _, v in found[name]], color=SERIES[0], lw=1.4, marker=marker
                )
                axes.set_title(label(name))
                axes.set_xlabel("step")
        ends = "; ".join(f"{name}: {found[name][0][1]:.4g} to {found[name][-1][1]:.4g}" for name in part)
        title = f"Training: {', '.join(part)}"
        pictures.append(Picture(f"training-{start // 3}", title, f"Lines over the steps. {ends}.", note, figure))
    return pictures


def _dumbbell(axes: "Axes", ends: tuple[float, float], place: int) -> None:
    axes.plot(ends, [place, place], color=MUTED, linewidth=1.2, zorder=2)
    axes.plot(ends[0], place, MARKERS[2], color=SERIES[1], markersize=6, zorder=3)
    axes.plot(ends[1], place, MARKERS[0], color=SERIES[0], markersize=7, zorder=3)


def _points(axes: "Axes", points: Points, shown: Sequence[str]) -> None:
    for place, group in enumerate(shown):
        chosen = [i for i, name in enumerate(points.groups) if name == group]
        x, y = [points.x[i] for i in chosen], [points.y[i] for i in chosen]
        axes.scatter(
            x, y, s=9, alpha=0.55, linewidths=0, color=SERIES[place], marker=MARKERS[place], label=label(group)
        )


def largest_groups(sizes: Mapping[str, float]) -> tuple[list[str], str]:
    """The largest groups, as many as colours tell apart, in the order of their names; and what to say of the others."""
    largest = sorted(sizes, key=lambda group: (-sizes[group], group))[: len(SERIES)]
    if len(largest) == len(sizes):
        return sorted(largest), ""
    return sorted(largest), f"The {len(largest)} largest of {len(sizes)} groups; the table has all."


def legend_above(figure: "Figure", axes: "Axes") -> None:
    """The legend of some axes, over all of them."""
    legend = figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, markerscale=2.0)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)


def _model_legend(figure: "Figure") -> None:
    from matplotlib.lines import Line2D

    before = Line2D([], [], color=SERIES[1], marker=MARKERS[2], linestyle="", label="before")
    after = Line2D([], [], color=SERIES[0], marker=MARKERS[0], linestyle="", label="after")
    figure.legend(handles=[before, after], loc="outside upper left", ncols=2, labelcolor=INK)
