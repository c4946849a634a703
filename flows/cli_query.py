"""`winnow query`: SQL over the lake as a table, JSON, CSV or Parquet; needs neither torch nor Prefect."""

import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows.cli_options import DEFAULT_LAKE, JsonOption, LakeOption, emit, output, table
from storage.lake import Lake

if TYPE_CHECKING:
    from storage.catalog import QueryResult

Format = Literal["table", "json", "csv", "parquet"]
SUFFIXES: dict[str, Format] = {".json": "json", ".csv": "csv", ".parquet": "parquet"}


def add_commands(app: typer.Typer) -> None:
    """Put the command of this module into `app`."""
    app.command("query")(query)


def query(
    sql: Annotated[str, typer.Argument(help="One DuckDB statement.")],
    lake: LakeOption = DEFAULT_LAKE,
    form: Annotated[
        Format | None, typer.Option("--format", help="By default that of --out's suffix, else a table.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write, whole or not at all.")] = None,
    as_json: JsonOption = False,
) -> None:
    """SQL over the lake: views prompts, candidates, preferences, groups, cuts, runs, rejected, metrics, training."""
    chosen = _format(form, out, as_json)
    opened = Lake.open(lake)
    if out is not None:
        _write(opened, sql, chosen, out, as_json)
    elif chosen == "csv":
        _print_csv(opened, sql)
    else:
        _show(opened, sql, chosen)


def _format(form: Format | None, out: Path | None, as_json: bool) -> Format:
    """The format that the options mean together; BadParameter where they contradict each other."""
    if out is None:
        if form == "parquet":
            raise typer.BadParameter("--format parquet needs a file; add --out FILE.parquet")
        if as_json and form not in (None, "json"):
            raise typer.BadParameter(f"--json and --format {form} exclude each other; drop one of them")
        return "json" if as_json else form or "table"
    if out.suffix not in SUFFIXES:
        raise typer.BadParameter(f'--out "{out}": give a file that ends in {", ".join(SUFFIXES)}')
    if form not in (None, SUFFIXES[out.suffix]):
        raise typer.BadParameter(f'--format {form} does not go with --out "{out}"; drop --format or rename the file')
    return SUFFIXES[out.suffix]


def _show(lake: Lake, sql: str, form: Format) -> None:
    from storage.catalog import query as run_query

    result = run_query(lake, sql)
    if form == "json":
        emit(_object(result))
    elif result.columns:
        output().print(table(result.columns, result.rows))


def _write(lake: Lake, sql: str, form: Format, out: Path, as_json: bool) -> None:
    from storage.catalog import query as run_query
    from storage.results import write_query
    from storage.rowfiles import whole_file

    if form == "json":
        result = run_query(lake, sql)
        with whole_file(out) as file:
            file.write(json.dumps(_object(result), default=str, ensure_ascii=False).encode() + b"\n")
        columns, n_rows = result.columns, len(result.rows)
    else:
        written = write_query(lake, sql, out)
        columns, n_rows = written.columns, written.n_rows
    if as_json:
        emit({"out": str(out.absolute()), "columns": columns, "rows": n_rows})
    else:
        output().print(f"{out}: {n_rows} rows, {len(columns)} columns", markup=False)


def _print_csv(lake: Lake, sql: str) -> None:
    from storage.results import stream_csv

    sys.stdout.flush()
    try:
        stream_csv(lake, sql, sys.stdout.buffer)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; Python would complain once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _object(result: "QueryResult") -> dict[str, object]:
    return {"columns": result.columns, "rows": _plain(result.rows)}


def _plain(value: object) -> object:
    """A value as JSON can hold it: NaN and infinities as text, keys as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
