"""Colours and figures: light colours here, and what each becomes in the dark.

The series colours are Okabe and Ito's, which most colour-blind people tell apart; lines and points differ in form too.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from storage.errors import ExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2328", "#59636e", "#d5dae0"
SERIES = ("#0072b2", "#d55e00", "#007a5a", "#b0578d", "#8a6d00", "#5c5c5c")
# Light colour -> colour on a dark page.
DARK: Mapping[str, str] = {
    INK: "#e6edf3",
    MUTED: "#9aa4af",
    GRID: "#363c44",
    SERIES[0]: "#56b4e9",
    SERIES[1]: "#ff9149",
    SERIES[2]: "#2ed3a2",
    SERIES[3]: "#e79cc7",
    SERIES[4]: "#f0e442",
    SERIES[5]: "#b8b8b8",
}
DASHES = ("solid", "dashed", "dashdot", "dotted", (0, (5, 1)), (0, (3, 1, 1, 1)))
MARKERS = ("o", "^", "s", "D", "v", "X")
MAX_LABEL = 24
_SETTINGS: dict[str, object] = {
    "font.size": 10.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "winnow",
    "text.color": INK,
    # A group may be named "$x$"; that is no formula.
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}


def need_matplotlib() -> None:
    """ExtraError where there is none."""
    if not has_matplotlib():
        raise ExtraError("plots need matplotlib, which is not installed; run: pip install 'winnow[report]'")


def has_matplotlib() -> bool:
    """Whether pictures can be drawn here."""
    return find_spec("matplotlib") is not None


@contextmanager
def settings() -> Iterator[None]:
    """Our settings of matplotlib; both drawing and saving need them."""
    import warnings

    import matplotlib

    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():  # type: ignore[arg-type]
        # Pages show text in the reader's fonts, which have more characters than matplotlib's.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(columns: int = 1, height: float = 2.9, width: float = 6.4) -> "tuple[Figure, list[Axes]]":
    """A figure with axes side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, [figure.add_subplot(1, columns, place + 1) for place in range(columns)]


def label(text: str) -> str:
    """A name as it fits a legend: printable, on one line, not long."""
    plain = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    # matplotlib leaves labels that begin with an underscore out of legends.
    shown = f"\N{ZERO WIDTH SPACE}{plain}" if plain.startswith("_") else plain
    return shown if len(shown) <= MAX_LABEL else f"{shown[: MAX_LABEL - 1]}\N{HORIZONTAL ELLIPSIS}"
