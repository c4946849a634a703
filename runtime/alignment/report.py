"""What a training leaves behind beside its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from runtime.alignment.figures import ALL, Figures


@dataclass(frozen=True, slots=True)
class Point:
    """A figure at an optimizer step, of one group or (None) of all pairs; split is train or test."""

    step: int
    split: str
    group: str | None
    metric: str
    value: float


def points_of(step: int, split: str, figures: Figures) -> list[Point]:
    """Figures as they are kept."""
    return [
        Point(step, split, name or None, metric, value)
        for name, values in figures.items()
        for metric, value in values.items()
        if metric != "pairs"
    ]


@dataclass(frozen=True, slots=True)
class Warned:
    """Something about a group that the reader of the figures must know."""

    group: str
    warning: str


@dataclass(slots=True)
class TrainingReport:
    """What happened. dropped, held_out_dropped, cut (by max_length): reason -> rows. Figures: of the final weights.

    reference_seconds: spent on stored log-probabilities of the reference; filled in by whoever has a clock.
    """

    steps: int
    n_rows: int
    dropped: Mapping[str, int]
    n_held_out: int = 0
    held_out_dropped: Mapping[str, int] = field(default_factory=dict)
    cut: Mapping[str, int] = field(default_factory=dict)
    n_tokens: int = 0
    reference_seconds: float = 0.0
    best_step: int | None = None
    suggested_step_size: float | None = None
    points: list[Point] = field(default_factory=list)
    groups: Figures = field(default_factory=dict)
    held_out: Figures = field(default_factory=dict)
    warnings: list[Warned] = field(default_factory=list)

    @property
    def held_out_worst(self) -> float | None:
        """The largest held-out loss of a group."""
        return max((values["loss"] for name, values in self.held_out.items() if name != ALL), default=None)

    def curve(self, metric: str, split: str = "train", group: str | None = None) -> list[float]:
        """The values of a metric, step by step."""
        return [p.value for p in self.points if (p.metric, p.split, p.group) == (metric, split, group)]
