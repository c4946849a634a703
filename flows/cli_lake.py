"""The commands that read the lake; they need neither torch nor Prefect."""

import json
from pathlib import Path
from typing import Annotated

import typer
from pydantic import JsonValue

from flows.cli_options import DEFAULT_LAKE, JsonOption, LakeOption, cell, emit, output, table
from storage.lake import Lake, Manifest

FIRST_ROWS = 3
MAIN_TABLES = ("preferences", "candidates", "prompts")


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this module into `app`."""
    app.command("catalog")(catalog)
    app.command("datasets")(datasets)
    app.command("show")(show)
    app.command("runs")(runs)


def catalog(
    file: Annotated[Path, typer.Argument(help="The DuckDB file to write; an older one is replaced.")],
    lake: LakeOption = DEFAULT_LAKE,
    as_json: JsonOption = False,
) -> None:
    """A DuckDB file with the lake's views, for other tools; versions made later need a new one."""
    from storage.catalog import VIEWS, write_catalog

    has_rows = write_catalog(Lake.open(lake), file)
    if as_json:
        emit({"catalog": str(file.absolute()), "views": list(VIEWS), "holds_rows": has_rows})
        return
    output().print(f"{file}: views {', '.join(VIEWS)}")
    if has_rows:
        output().print(f"The rows were copied out of {lake} into the file; over a local lake it would only name them.")


def datasets(lake: LakeOption = DEFAULT_LAKE, as_json: JsonOption = False) -> None:
    """Every dataset and version in the lake, oldest first."""
    manifests = Lake.open(lake).manifests()
    if as_json:
        emit({"datasets": [m.model_dump(mode="json", exclude={"files", "config"}) for m in manifests]})
        return
    if not manifests:
        output().print(f"no datasets in {lake} yet; start with `winnow demo` or `winnow ingest`")
        return
    rows = [
        (m.label, m.stage, f"{m.created_at:%Y-%m-%d %H:%M:%S}", sum(file.rows or 0 for file in m.files) or None)
        for m in manifests
    ]
    output().print(table(["version", "stage", "made (UTC)", "rows"], rows))


def runs(
    last: Annotated[int, typer.Option(min=1, help="So many, the latest ones.")] = 20,
    stage: Annotated[str | None, typer.Option(help="Of one stage only, such as generate.")] = None,
    lake: LakeOption = DEFAULT_LAKE,
    as_json: JsonOption = False,
) -> None:
    """What was made when, and what it took: the view `runs`, latest last."""
    from storage.summary import COUNTERS, counters

    made = [m for m in Lake.open(lake).manifests() if stage in (None, m.stage)][-last:]
    if as_json:
        emit({"runs": [_run(m) | {"inputs": m.inputs} for m in made]})
        return
    if not made:
        output().print(f"no runs{f' of {stage}' if stage else ''} in {lake} yet; see `winnow datasets`")
        return
    columns = ["made (UTC)", "stage", "version", *(name.replace("_", " ") for name in COUNTERS), "seconds"]
    rows = [(f"{m.created_at:%Y-%m-%d %H:%M}", m.stage, m.label, *counters(m).values(), _seconds(m)) for m in made]
    output().print(table(columns, rows))


def _run(manifest: Manifest) -> dict[str, object]:
    from storage.summary import counters

    place = {"made_at": manifest.created_at, "stage": manifest.stage, "ref": manifest.label}
    return place | counters(manifest) | {"seconds": _seconds(manifest)}


def _seconds(manifest: Manifest) -> JsonValue:
    return manifest.stats.get("seconds")


def show(
    ref: Annotated[str, typer.Argument(help="kind/name or kind/name@version.")],
    lake: LakeOption = DEFAULT_LAKE,
    as_json: JsonOption = False,
) -> None:
    """One version: lineage, configuration, statistics, files, first rows."""
    opened = Lake.open(lake)
    found = opened.resolve(ref)
    manifest = opened.manifest(found)
    main_table = next((name for name in MAIN_TABLES if manifest.shards(name)), None)
    first = next(opened.iter_shards(found, main_table)).slice(0, FIRST_ROWS).to_pylist() if main_table else []
    if as_json:
        emit(manifest.model_dump(mode="json") | {"uri": found.uri, "first_rows": first})
        return
    console = output()
    console.print(f"{found}  ({manifest.stage}, {manifest.created_at:%Y-%m-%d %H:%M:%S} UTC)\n{found.uri}\n")
    facts = [("from", role, text) for role, text in manifest.inputs.items()]
    facts += [("config", key, json.dumps(value)) for key, value in manifest.config.items()]
    facts += [("stats", key, json.dumps(value)) for key, value in manifest.stats.items()]
    console.print(table(["", "key", "value"], facts))
    console.print()
    console.print(table(["file", "rows", "bytes"], [(f.path, f.rows, f.size_bytes) for f in manifest.files]))
    for row in first:
        console.print()
        console.print(table([f"first rows of {main_table}", ""], [(key, _short(value)) for key, value in row.items()]))


def _short(value: object) -> str:
    text = cell(value)
    return text if len(text) <= 300 else f"{text[:300]}..."
