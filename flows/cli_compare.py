"""The command that compares methods of fine-tuning."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from flows.cli_options import (
    DEFAULT_LAKE,
    JsonOption,
    LakeOption,
    NameOption,
    SetOption,
    VerboseOption,
    emit,
    output,
    overrides,
    table,
)
from flows.cli_run import progress_bars
from flows.config import explain, load_config
from storage.lake import Lake
from tasks.errors import ConfigError
from tasks.settings import CompareConfig, PipelineConfig


def add_commands(app: typer.Typer) -> None:
    """Put the command of this module into `app`."""
    app.command("compare")(compare)


def compare(
    config: Annotated[Path, typer.Argument(help="TOML file of the pipeline, with a section [compare].")],
    name: NameOption = None,
    values: SetOption = [],  # noqa: B006
    lake: LakeOption = DEFAULT_LAKE,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train several methods on the same pairs and seeds, and compare them per group and by the worst one."""
    found = compared(load_config(config, overrides(values, name)))
    from flows.prefect_settings import prepare_prefect

    prepare_prefect(verbose, "compare")
    from flows.compare import compare as flow
    from tasks.comparison import overview

    opened = Lake.open(lake)
    with progress_bars():
        ref = flow(found, opened.root)
    stats = opened.manifest(ref).stats
    if as_json:
        emit({"ref": str(ref), "uri": ref.uri, "stats": stats})
        return
    rows = overview(stats["comparison"])  # type: ignore[arg-type]
    output().print(f"{ref}\n{ref.uri}")
    output().print(table(list(rows[0]), [list(row.values()) for row in rows]))


def compared(config: PipelineConfig) -> CompareConfig:
    """The section [compare] with what it takes from the others."""
    for section in ("finetune", "evaluate"):
        if getattr(config.compare, section) != type(getattr(config.compare, section))():
            raise ConfigError(f"config: compare.{section} is taken from [{section}]; set it there")
    shared = {"finetune": config.finetune, "evaluate": config.evaluate}
    try:
        return config.stage(config.compare.model_copy(update=shared))
    except ValidationError as error:
        raise ConfigError(explain(error, CompareConfig)) from error
