"""`winnow view`: a version in the layout of a trainer; needs neither torch nor Prefect."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from flows.cli_options import DEFAULT_LAKE, JsonOption, LakeOption, emit, output, table
from storage.lake import DatasetRef, Lake
from storage.layouts import LAYOUTS

if TYPE_CHECKING:
    from storage.views import Selection

FIRST_ROWS = 3


def add_commands(app: typer.Typer) -> None:
    """Put the command of this module into `app`."""
    app.command("view")(view)


def view(
    ref: Annotated[str, typer.Argument(help="kind/name or kind/name@version.")],
    form: Annotated[str, typer.Argument(metavar="FORMAT", help=f"One of {', '.join(LAYOUTS)}.")],
    out: Annotated[Path | None, typer.Option("--out", help=".parquet, .jsonl, .json; .csv for text.")] = None,
    lake: LakeOption = DEFAULT_LAKE,
    split: Annotated[str | None, typer.Option("--split", help="One split; needed where there are several.")] = None,
    group: Annotated[str | None, typer.Option("--group", help="Only this group.")] = None,
    skip_unfit: Annotated[
        bool, typer.Option("--skip-unfit", help="Leave out, and count, rows that FORMAT cannot carry.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """A version in the layout of a trainer, as a file; without --out its first rows."""
    from storage.views import Selection, first_rows

    opened = Lake.open(lake)
    found = opened.resolve(ref)
    selection = Selection(form, split, group, skip_unfit)
    if out is not None:
        written = _write(opened, found, selection, out)
        emit(written) if as_json else output().print(_summary(written), markup=False)
        return
    rows = first_rows(opened, found, selection, FIRST_ROWS)
    if as_json:
        emit({"ref": str(found), "format": form, "first_rows": rows})
        return
    for row in rows:
        # As text, so that numbers and lists stand under each other.
        values = [(key, json.dumps(value, ensure_ascii=False)) for key, value in row.items()]
        output().print(table([f"{found} as {form}", ""], values))
        output().print()


def _write(lake: Lake, ref: DatasetRef, selection: "Selection", out: Path) -> dict[str, object]:
    from storage.views import write_view

    written = write_view(lake, ref, selection, out)
    return {
        "ref": str(ref),
        "format": selection.layout,
        "out": str(out.absolute()),
        "columns": written.columns,
        "rows": written.n_rows,
        "unfit": dict(written.unfit),
    }


def _summary(written: dict[str, object]) -> str:
    unfit = cast(dict[str, int], written["unfit"])
    left_out = "".join(f"\nleft out, {count}: {reason}" for reason, count in unfit.items())
    return f"{written['out']}: {written['rows']} rows of {written['ref']} as {written['format']}{left_out}"
