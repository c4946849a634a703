"""What a stage shows in Prefect: a markdown summary, a table, and progress while it runs.

Outside a Prefect run (tests, library use) nothing is shown.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import cast
from uuid import UUID

from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.context import get_run_context
from prefect.exceptions import MissingContextError

from storage.lake import DatasetRef
from tasks.assets import announce
from tasks.logs import log_event

Cell = str | int | float | None
Display = Callable[[str, int, int], None]  # (label, done, total)
_displays: list[Display] = []
# The page of an artifact stays quick up to these.
MOST_ROWS = 1000
MOST_BYTES = 1_000_000


def show_stage(ref: DatasetRef, summary: Mapping[str, object], rows: Sequence[Mapping[str, Cell]]) -> None:
    """One summary, with where the dataset is, one table, and an event for a finished stage."""
    if not in_run():
        return
    lines = [f"## {ref}", "", "| | |", "|---|---|", *(f"| {key} | {_text(value)} |" for key, value in summary.items())]
    lines += ["", *_places(ref)]
    key = _key(f"{ref.kind}-{ref.name}")
    create_markdown_artifact(_bounded("\n".join(lines)), key=f"{key}-summary", description=f"Summary of {ref}")
    show_table(ref, "table", rows, "Per group")
    announce(ref)


def show_table(ref: DatasetRef, key: str, rows: Sequence[Mapping[str, Cell]], title: str = "") -> None:
    """A table of a finished stage, under its key if it has no title; of a long one the first rows."""
    if not in_run() or not rows:
        return
    table = [{name: _rounded(cell) for name, cell in row.items()} for row in rows[:MOST_ROWS]]
    bound = f", first {MOST_ROWS:,} of {len(rows):,} rows" if len(rows) > MOST_ROWS else ""
    create_table_artifact(table, key=_key(f"{ref.kind}-{ref.name}-{key}"), description=f"{title or key}{bound}: {ref}")


def show_image(ref: DatasetRef, url: str, description: str, key: str = "image") -> None:
    """A picture beside a stage's summary; `url` may hold the picture itself. One that the page would choke on is named
    in the log instead."""
    if not in_run():
        return
    if len(url) > MOST_BYTES:
        log_event("picture-left-out", ref=str(ref), picture=key, bytes=len(url), most=MOST_BYTES)
        return
    create_image_artifact(url, key=_key(f"{ref.kind}-{ref.name}-{key}"), description=f"{description}: {ref}")


class ShownProgress:
    """A callback that moves a progress artifact and every subscribed display: at most once per percent and second."""

    def __init__(self, label: str, unit: str, clock: Callable[[], float], has_artifact: bool) -> None:
        self.label, self.unit, self.clock = label, unit, clock
        self.started = self.shown_at = clock()
        self.percent = self.tokens = self.done = self.total = 0
        shown = has_artifact and in_run()
        self.artifact_id = create_progress_artifact(0.0, key=_key(label), description=label) if shown else None

    def __call__(self, done: int, total: int) -> None:
        """So much is done."""
        percent = int(100 * done / max(total, 1))
        if percent <= self.percent:
            return
        self.percent = percent
        for display in _displays:
            display(self.label, done, total)
        self.done, self.total = done, total
        if self.clock() - self.shown_at >= 1 or done >= total:
            self.show()

    def count(self, tokens: int) -> None:
        """So many tokens more were decoded."""
        self.tokens += tokens

    def show(self) -> None:
        """Bring the artifact up to date."""
        self.shown_at = self.clock()
        if self.artifact_id is not None:
            text = self.text(self.done, self.total, self.shown_at - self.started)
            update_progress_artifact(cast(UUID, self.artifact_id), float(self.percent), description=text)

    def text(self, done: int, total: int, seconds: float) -> str:
        """What the artifact says beside its percentage."""
        parts = [f"{self.label}: {done:,} of {total:,} {self.unit}".rstrip()]
        if self.tokens:
            parts.append(f"{self.tokens:,} tokens, {self.tokens / max(seconds, 1e-3):,.0f} per second")
        if 0 < done < total:
            parts.append(f"about {_duration(seconds * (total - done) / done)} left")
        elif done >= total:
            parts.append(f"took {_duration(seconds)}")
        return "; ".join(parts)


def progress(
    label: str, unit: str = "", clock: Callable[[], float] = time.monotonic, has_artifact: bool = True
) -> ShownProgress:
    """Progress of something that takes a while, counted in prompts, steps or the like."""
    return ShownProgress(label, unit, clock, has_artifact)


def subscribe(display: Display) -> None:
    """Have progress shown in this process too, such as by a bar on the terminal."""
    _displays.append(display)


def in_run() -> bool:
    """Whether this is a Prefect run, where artifacts can be shown."""
    try:
        get_run_context()
    except MissingContextError:
        return False
    return True


def _places(ref: DatasetRef) -> list[str]:
    """Where to look further; the address of a lake holds no secret."""
    link = f"[{ref.uri}](file://{ref.uri})" if ref.uri.startswith("/") else f"`{ref.uri}`"
    return [f"Dataset: {link}", "", f"Report: `winnow report {ref} --lake {ref.root}`"]


def _bounded(text: str) -> str:
    if len(text) <= MOST_BYTES:
        return text
    return f"{text[:MOST_BYTES]}\n\n(cut here: {len(text):,} characters; `winnow show` has all)"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _key(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _text(value: object) -> str:
    return str(_rounded(value) if isinstance(value, float) else value).replace("|", "\\|")


def _rounded(cell: Cell) -> Cell:
    return round(cell, 4) if isinstance(cell, float) else cell
