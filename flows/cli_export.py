"""The command that takes a model out of the lake."""

import json
from typing import Annotated

import typer

from flows.cli_options import (
    DEFAULT_LAKE,
    ConfigOption,
    JsonOption,
    LakeOption,
    NameOption,
    SetOption,
    VerboseOption,
    overrides,
)
from flows.cli_run import run_stage
from flows.config import load_config


def add_commands(app: typer.Typer) -> None:
    """Put the command of this module into `app`."""
    app.command("export")(export)


def export(
    model: Annotated[str | None, typer.Argument(help="models/NAME, starter, a folder or a hub name.")] = None,
    format: Annotated[str | None, typer.Option("--format", help="bundle (default), powerinfer, gguf or hf.")] = None,
    candidates: Annotated[str | None, typer.Option(help="REF of answers to calibrate and measure on.")] = None,
    name: NameOption = None,
    config: ConfigOption = None,
    values: SetOption = [],  # noqa: B006
    lake: LakeOption = DEFAULT_LAKE,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write models/NAME as a bundle that runs below its size, for PowerInfer, as GGUF, or as a Hugging Face folder."""
    given = {"model": model, "format": format, "candidates": candidates}
    shortcuts = [f"export.{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    run_stage("export", load_config(config, [*overrides(values, name), *shortcuts]), lake, as_json, verbose)
