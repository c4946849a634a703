"""The commands that show versions to people elsewhere: an HTML report, and a dataset on a hub."""

import uuid
from pathlib import Path
from typing import Annotated

import typer

from flows.cli_options import DEFAULT_LAKE, JsonOption, LakeOption, emit, output
from storage.errors import LakeError
from storage.lake import Lake


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this module into `app`."""
    app.command("report")(report)
    app.command("push")(push)


def report(
    ref: Annotated[str, typer.Argument(help="kind/name or kind/name@version.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="HTML file; the default is KIND-NAME-VERSION.html here.")
    ] = None,
    lake: LakeOption = DEFAULT_LAKE,
    as_json: JsonOption = False,
) -> None:
    """One HTML page on a version, readable offline: groups, scores, cuts, drops, samples, lineage."""
    from storage.report.page import build_report

    opened = Lake.open(lake)
    found = opened.resolve(ref)
    path = out or Path(f"{found.kind}-{found.name}-{found.version}.html")
    made = build_report(opened, found)
    _write(path, made.html)
    if as_json:
        facts = {"report": str(path.absolute()), "sections": made.sections, "pictures": made.pictures}
        emit({"ref": str(found), **facts, "size_bytes": path.stat().st_size})
    else:
        output().print(f"{path}: {found}, {len(made.pictures)} pictures, {path.stat().st_size} bytes")


def push(
    ref: Annotated[str, typer.Argument(help="kind/name or kind/name@version of a dataset.")],
    name: Annotated[str, typer.Argument(help="Where it goes on the hub: USER/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Only for you, when the dataset is new there.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch; made where there is none.")] = None,
    lake: LakeOption = DEFAULT_LAKE,
    as_json: JsonOption = False,
) -> None:
    """Upload a version to the Hugging Face hub: card, manifest and Parquet, after checking every file."""
    from storage.hub import Target
    from storage.hub import push as push_version

    opened = Lake.open(lake)
    found = opened.resolve(ref)
    pushed = push_version(opened, found, Target(name, private, revision))
    if as_json:
        emit({"ref": str(found), "url": pushed.url, "commit": pushed.commit, "files": pushed.files})
    else:
        output().print(f"{found}: {len(pushed.files)} files at {pushed.url}")


def _write(path: Path, text: str) -> None:
    """Whole or not at all; an older file is replaced."""
    temporary = path.absolute().with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path.absolute())
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise LakeError(
            f'report "{path}" cannot be written ({reason}); give --out FILE in a writable folder'
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
