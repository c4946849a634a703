"""The commands that run flows: one per stage, `run` for all of them, and `plan`, which runs nothing."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli_options import (
    DEFAULT_LAKE,
    ConfigOption,
    JsonOption,
    LakeOption,
    NameOption,
    SetOption,
    VerboseOption,
    cell,
    emit,
    messages,
    output,
    overrides,
    table,
)
from flows.config import load_config
from storage.lake import DatasetRef, Lake
from tasks.settings import ExecutionConfig, PipelineConfig, StageConfig

if TYPE_CHECKING:
    from prefect import Flow

    from tasks.drafting import DraftingPlan

STAGE_HELP = {
    "generate": "Best-of-N candidates for prompts/NAME, with cuts or without.",
    "calibrate": "Measure how far partial scores can be trusted, and propose a schedule of cuts.",
    "score": "Final scores of candidates/NAME.",
    "assemble": "Preference pairs from scored candidates/NAME.",
    "finetune": "Train the policy on preferences/NAME.",
    "align": "Train the policy on its own answers to prompts/NAME, scored as they are drawn.",
    "evaluate": "Answer held-out prompts before and after, compared per group.",
}


def add_commands(app: typer.Typer) -> None:
    """Put the commands of this module into `app`."""
    app.command("run")(run)
    app.command("iterate")(iterate)
    app.command("plan")(plan)
    app.command("ingest")(ingest)
    app.command("import")(import_preferences)
    app.command("adapt")(adapt)
    for stage, text in STAGE_HELP.items():
        app.command(stage, help=text)(_stage_command(stage))


def run(
    config: Annotated[Path, typer.Argument(help="TOML file of the pipeline.")],
    lake: LakeOption = DEFAULT_LAKE,
    values: SetOption = [],  # noqa: B006 (typer reads the default, nobody changes it)
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run the whole chain on a configuration; stages that are in the lake are not run again."""
    pipeline_config = load_config(config, values)
    refs, cached = run_pipeline(pipeline_config, lake, verbose)
    if as_json:
        emit({"stages": {stage: _described(ref, lake) | {"cached": cached[stage]} for stage, ref in refs.items()}})
        return
    rows = [(stage, str(ref), "in the lake" if cached[stage] else "made") for stage, ref in refs.items()]
    output().print(table(["stage", "version", ""], rows))


def iterate(
    config: Annotated[Path, typer.Argument(help="TOML file of the pipeline, with a section [iterate].")],
    lake: LakeOption = DEFAULT_LAKE,
    values: SetOption = [],  # noqa: B006
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run rounds of generate, score, assemble and finetune, each from the last one's model."""
    from flows.prefect_settings import prepare_prefect

    settings, root = load_config(config, values), Lake.open(lake).root
    prepare_prefect(verbose, "iterate")
    from flows.iterate import iterate as run_rounds

    with progress_bars():
        refs = run_rounds(settings, root)
    if as_json:
        emit({stage: {"ref": str(ref), "uri": ref.uri} for stage, ref in refs.items()})
        return
    output().print(table(["stage", "version", "folder"], [(stage, str(ref), ref.uri) for stage, ref in refs.items()]))


def plan(
    config: Annotated[Path, typer.Argument(help="TOML file of the pipeline.")],
    lake: LakeOption = DEFAULT_LAKE,
    values: SetOption = [],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """Show what `run` would do: versions, cache hits, upper bounds of candidates, tokens and key-value memory.

    With S3D also what it is worth here: a few rounds of each size are timed.
    """
    from tasks.drafting import plan_drafting
    from tasks.plan import plan as plan_stages

    settings, opened = load_config(config, values), Lake.open(lake)
    plans, drafting = plan_stages(settings, opened), plan_drafting(settings.generate, opened)
    if as_json:
        s3d = drafting and dataclasses.asdict(drafting)
        emit({"stages": [dataclasses.asdict(stage) for stage in plans], "s3d": s3d})
        return
    rows = [
        (
            p.stage,
            p.ref,
            "in the lake" if p.is_cached else "would run",
            p.n_prompts,
            p.n_candidates,
            p.max_new_tokens,
            None if p.kv_bytes is None else f"{p.kv_bytes / 2**20:.0f} MiB",
        )
        for p in plans
    ]
    columns = ["stage", "version", "", "prompts", "candidates", "new tokens <=", "key-value memory <="]
    output().print(table(columns, rows))
    if drafting is not None:
        _print_drafting(drafting)


def _print_drafting(found: "DraftingPlan") -> None:
    console = output()
    console.print(f"\nS3D adds {found.adapter_bytes / 1000:.0f} kB of weights and no keys or values. Predicted here:")
    rows = [
        (f.rows, f.k or "none", f"{f.tokens_per_round:.2f}", f"{f.break_even:.2f}", f"{f.speedup:.2f}")
        for f in found.forecasts
    ]
    columns = ["rows", "drafts", "tokens per round", "needed", "times plain decoding"]
    console.print(table(columns, rows))


def ingest(
    source: Annotated[str | None, typer.Argument(help="starter, a file, a folder or a hub name.")] = None,
    name: NameOption = None,
    group_column: Annotated[str | None, typer.Option(help="Column that says who is asking.")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column with plain text.")] = None,
    config: ConfigOption = None,
    values: SetOption = [],  # noqa: B006
    lake: LakeOption = DEFAULT_LAKE,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Prompts from JSONL, Parquet, CSV, a datasets folder or hub name, or the starter."""
    given = {"source": source, "group_column": group_column, "prompt_column": prompt_column}
    found = load_config(config, [*overrides(values, name), *_shortcuts("ingest", given)])
    run_stage("ingest", found, lake, as_json, verbose)


def import_preferences(
    source: Annotated[str | None, typer.Argument(help="A file, a folder, or a hub name.")] = None,
    name: NameOption = None,
    layout: Annotated[str | None, typer.Option(help="columns (default), hh_rlhf, persona or annotators.")] = None,
    group: Annotated[str | None, typer.Option(help="One group for all pairs.")] = None,
    group_column: Annotated[str | None, typer.Option(help="Column that says whose preference it is.")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column with text or messages.")] = None,
    test_share: Annotated[float | None, typer.Option(help="Share of prompts kept out of training.")] = None,
    config: ConfigOption = None,
    values: SetOption = [],  # noqa: B006
    lake: LakeOption = DEFAULT_LAKE,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Preference pairs that are there already, with their groups: HH-RLHF, persona statements, annotators, any table.

    Every other field is set with --set import.FIELD=VALUE; docs/importing.md lists them.
    """
    given: dict[str, object] = {"source": source, "layout": layout, "group_constant": group}
    given |= {"group_column": group_column, "prompt_column": prompt_column, "test_share": test_share}
    found = load_config(config, [*overrides(values, name), *_shortcuts("import", given)])
    run_stage("import_preferences", found, lake, as_json, verbose)


def adapt(
    model: Annotated[str | None, typer.Argument(help="starter, a folder, a hub name or models/NAME.")] = None,
    candidates: Annotated[str | None, typer.Option(help="REF of its own answers; default: draw some.")] = None,
    name: NameOption = None,
    config: ConfigOption = None,
    values: SetOption = [],  # noqa: B006
    lake: LakeOption = DEFAULT_LAKE,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train an S3D adapter, with which a policy drafts for itself; it becomes models/NAME-s3d."""
    given = {"model": model, "candidates": candidates}
    found = load_config(config, [*overrides(values, name), *_shortcuts("adapt", given)])
    run_stage("adapt", found, lake, as_json, verbose)


def _shortcuts(section: str, given: Mapping[str, object]) -> list[str]:
    """Options that stand for fields of a section, as --set takes them."""
    return [f"{section}.{key}={json.dumps(value)}" for key, value in given.items() if value is not None]


def run_pipeline(config: PipelineConfig, lake: str, verbose: bool) -> tuple[dict[str, DatasetRef], dict[str, bool]]:
    """Run the pipeline flow; its references, and which of them were in the lake before."""
    from flows.prefect_settings import prepare_prefect

    prepare_prefect(verbose, "pipeline")
    from flows.pipeline import pipeline
    from tasks.plan import steps

    opened = Lake.open(lake)
    cached = {stage: step.published(opened) is not None for stage, step in steps(config, opened).items()}
    with progress_bars():
        return pipeline(config.chain(), opened.root, config.execution), cached


@contextmanager
def progress_bars() -> Iterator[None]:
    """Bars for everything that reports progress, on a terminal only."""
    console = messages()
    if not console.is_terminal:
        yield
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from tasks.artifacts import subscribe

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bars:
        known: dict[str, object] = {}

        def show(label: str, done: int, total: int) -> None:
            if label not in known:
                known[label] = bars.add_task(label, total=total)
            bars.update(known[label], completed=done, total=total)  # type: ignore[arg-type]

        subscribe(show)
        yield


def _stage_command(stage: str) -> Callable[..., None]:
    def command(
        name: NameOption = None,
        config: ConfigOption = None,
        values: SetOption = [],  # noqa: B006
        lake: LakeOption = DEFAULT_LAKE,
        as_json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        run_stage(stage, load_config(config, overrides(values, name)), lake, as_json, verbose)

    return command


def run_stage(stage: str, config: PipelineConfig, lake: str, as_json: bool, verbose: bool) -> None:
    """Run the flow of one stage, and show what it made."""
    from flows.prefect_settings import prepare_prefect

    prepare_prefect(verbose, stage)
    root = Lake.open(lake).root
    with progress_bars():
        ref = _flow(stage)(_stage_config(config, stage), root, **_spread(config, stage))
    described = _described(ref, lake)
    if as_json:
        emit(described)
        return
    output().print(f"{ref}\n{ref.uri}")
    stats = described["stats"]
    assert isinstance(stats, dict)
    for key, value in stats.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            output().print(table(list(value[0]), [list(row.values()) for row in value]))
        elif not isinstance(value, dict) or not any(isinstance(inner, list) for inner in value.values()):
            output().print(f"  {key}: {cell(value)}")


def _stage_config(config: PipelineConfig, stage: str) -> StageConfig:
    if stage == "calibrate":
        return config.stage(config.calibrate.model_copy(update={"generate": config.generate}))
    found: StageConfig = getattr(config, stage)
    return config.stage(found)


def _spread(config: PipelineConfig, stage: str) -> dict[str, ExecutionConfig]:
    """How the stage is spread out, for those that can be."""
    return {"execution": config.execution} if stage in ("generate", "score") else {}


def _flow(stage: str) -> "Flow[..., DatasetRef]":
    import importlib

    found: Flow[..., DatasetRef] = getattr(importlib.import_module(f"flows.{stage}"), stage)
    return found


def _described(ref: DatasetRef, lake: str) -> dict[str, object]:
    return {"ref": str(ref), "uri": ref.uri, "stats": Lake.open(lake).manifest(ref).stats}
