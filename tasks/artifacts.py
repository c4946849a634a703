"""What a stage shows in Prefect: a markdown summary, a table, and progress while it runs.

Outside a Prefect run (tests, library use) nothing is shown.
"""

import re
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

from runtime.records import Progress
from storage.lake import DatasetRef

Cell = str | int | float | None
Display = Callable[[str, int, int], None]  # (label, done, total)
_displays: list[Display] = []


def show_stage(ref: DatasetRef, summary: Mapping[str, object], rows: Sequence[Mapping[str, Cell]]) -> None:
    """One summary and one table for a finished stage."""
    if not in_run():
        return
    lines = [f"## {ref}", "", "| | |", "|---|---|", *(f"| {key} | {_text(value)} |" for key, value in summary.items())]
    key = _key(f"{ref.kind}-{ref.name}")
    create_markdown_artifact("\n".join(lines), key=f"{key}-summary", description=f"Summary of {ref}")
    if rows:
        table = [{name: _rounded(cell) for name, cell in row.items()} for row in rows]
        create_table_artifact(table, key=f"{key}-table", description=f"Per group: {ref}")


def show_table(ref: DatasetRef, what: str, rows: Sequence[Mapping[str, Cell]]) -> None:
    """Another table of a finished stage."""
    if in_run() and rows:
        table = [{name: _rounded(cell) for name, cell in row.items()} for row in rows]
        create_table_artifact(table, key=_key(f"{ref.kind}-{ref.name}-{what}"), description=f"{what}: {ref}")


def show_image(ref: DatasetRef, url: str, description: str, key: str = "image") -> None:
    """A picture beside a stage's summary; `url` may hold the picture itself."""
    if in_run():
        create_image_artifact(url, key=_key(f"{ref.kind}-{ref.name}-{key}"), description=f"{description}: {ref}")


def progress(label: str) -> Progress:
    """A callback that moves a progress artifact and every subscribed display, at most once per percent."""
    artifact_id = create_progress_artifact(0.0, key=_key(label), description=label) if in_run() else None
    shown = 0

    def update(done: int, total: int) -> None:
        nonlocal shown
        percent = int(100 * done / max(total, 1))
        if percent > shown:
            shown = percent
            for display in _displays:
                display(label, done, total)
            if artifact_id is not None:
                update_progress_artifact(cast(UUID, artifact_id), float(percent))

    return update


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


def _key(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _text(value: object) -> str:
    return str(_rounded(value) if isinstance(value, float) else value).replace("|", "\\|")


def _rounded(cell: Cell) -> Cell:
    return round(cell, 4) if isinstance(cell, float) else cell
