"""Options that several commands share, and how results and errors are written."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

LakeOption = Annotated[
    str, typer.Option("--lake", envvar="WINNOW_LAKE", help="Folder of the lake, or s3://BUCKET/PREFIX.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, logs on standard error.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show Prefect's logs.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file of a pipeline.")]
SetOption = Annotated[list[str], typer.Option("--set", help="Override a value: stage.key=value. Repeatable.")]
NameOption = Annotated[str | None, typer.Option("--name", help="Name of the datasets; overrides the configuration.")]
ThreadsOption = Annotated[int, typer.Option("--threads", min=1, help="Threads torch may use.")]

DEFAULT_LAKE = "lake"


def overrides(values: Sequence[str], name: str | None) -> list[str]:
    """`--set` values, with `--name` among them."""
    return [*values, *([f"name={json.dumps(name)}"] if name else [])]


def output() -> Console:
    """Results go here."""
    is_terminal = sys.stdout.isatty()
    # A file or a pipe has no width to fold at.
    width = None if is_terminal or "COLUMNS" in os.environ else 240
    return Console(highlight=False, soft_wrap=not is_terminal, width=width)


def messages() -> Console:
    """Progress, logs and errors go here."""
    return Console(stderr=True, highlight=False)


def emit(value: Mapping[str, object]) -> None:
    """The one JSON object of a command."""
    print(json.dumps(value, default=str, ensure_ascii=False))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> Table:
    """A plain table; numbers to the right."""
    found = Table(title=title, title_justify="left", show_edge=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        is_number = any(isinstance(row[index], int | float) for row in rows)
        found.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        found.add_row(*(cell(value) for value in row))
    return found


def cell(value: object) -> str:
    """A value as it stands in a table: floats short, nothing for None, markup escaped."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(str(value))
