"""The commands for the life of versions: verify, copy, gc. They need neither torch nor Prefect."""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from flows.cli_options import DEFAULT_LAKE, JsonOption, LakeOption, emit, output, table
from storage.lake import Lake
from tasks.errors import ConfigError

UNITS = {"h": "hours", "d": "days", "w": "weeks"}


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this module into `app`."""
    app.command("verify")(verify)
    app.command("copy")(copy)
    app.command("gc")(gc)


def verify(
    ref: Annotated[str, typer.Argument(help="kind/name or kind/name@version.")],
    lake: LakeOption = DEFAULT_LAKE,
    as_json: JsonOption = False,
) -> None:
    """Read every file of a version again and compare it with the manifest; exit code 1 when one differs."""
    from storage.verify import verify as verify_files

    opened = Lake.open(lake)
    found = opened.resolve(ref)
    verdicts = list(verify_files(opened, found))
    problems = [verdict for verdict in verdicts if verdict.problem is not None]
    if as_json:
        files = [{"path": v.path, "size_bytes": v.size_bytes, "problem": v.problem} for v in verdicts]
        emit({"ref": str(found), "is_whole": not problems, "files": files})
    elif problems:
        output().print(table(["file", "problem"], [(verdict.path, verdict.problem) for verdict in problems]))
    else:
        n_bytes = sum(verdict.size_bytes for verdict in verdicts)
        output().print(f"{found}: {len(verdicts)} files, {n_bytes} bytes, all as the manifest says")
    if problems:
        raise typer.Exit(1)


def copy(
    ref: Annotated[str, typer.Argument(help="kind/name or kind/name@version.")],
    destination: Annotated[str, typer.Argument(help="The other lake: a folder or s3://BUCKET/PREFIX.")],
    with_inputs: Annotated[
        bool, typer.Option("--with-inputs", help="Also everything the version was made from.")
    ] = False,
    lake: LakeOption = DEFAULT_LAKE,
    as_json: JsonOption = False,
) -> None:
    """Copy a version into another lake, every file checked on its way; a killed copy goes on where it was."""
    from storage.copy import copy as copy_version
    from storage.copy import copy_with_inputs

    source, target = Lake.open(lake), Lake.open(destination)
    found = source.resolve(ref)
    copies = list(copy_with_inputs(source, found, target)) if with_inputs else [copy_version(source, found, target)]
    missing = sorted({text for copied in copies for text in copied.missing_inputs})
    if as_json:
        versions = [
            {"ref": str(c.ref), "uri": c.ref.uri, "is_new": c.is_new, "files_sent": c.files_sent} for c in copies
        ]
        emit({"copied": versions, "missing_inputs": missing})
        return
    rows = [(str(c.ref), "copied" if c.is_new else "there already", c.files_sent, c.ref.uri) for c in copies]
    output().print(table(["version", "", "files sent", "folder"], rows))
    for text in missing:
        output().print(f"not in {source.root}, so not copied: {text}")


def gc(
    older_than: Annotated[str, typer.Option(help="Age from which leftovers go, such as 12h, 7d or 2w.")] = "7d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only name what would be removed.")] = False,
    lake: LakeOption = DEFAULT_LAKE,
    as_json: JsonOption = False,
) -> None:
    """Remove what killed and abandoned runs left in the lake; files of published versions are never touched."""
    from storage.gc import collect

    found = list(collect(Lake.open(lake), parse_age(older_than), datetime.now(UTC), dry_run))
    n_bytes = sum(leftover.item.size_bytes for leftover in found)
    if as_json:
        items = [
            {"key": f.item.key, "size_bytes": f.item.size_bytes, "modified_at": f.item.modified_at, "reason": f.reason}
            for f in found
        ]
        emit({"is_dry_run": dry_run, "removed": items, "size_bytes": n_bytes})
        return
    if found:
        rows = [(f.item.key, f.item.size_bytes, f"{f.item.modified_at:%Y-%m-%d %H:%M}", f.reason) for f in found]
        output().print(table(["file", "bytes", "written (UTC)", "why"], rows))
    output().print(f"{len(found)} files, {n_bytes} bytes {'would be removed' if dry_run else 'removed'}")


def parse_age(text: str) -> timedelta:
    """12h, 7d or 2w as a time span; ConfigError for anything else."""
    match = re.fullmatch(r"(\d{1,6})([hdw])", text)
    if match is None:
        raise ConfigError(f'--older-than "{text}": write a number of hours, days or weeks, such as 12h, 7d or 2w')
    return timedelta(**{UNITS[match[2]]: int(match[1])})
