"""Training on preference pairs; the result is a plain Hugging Face folder in the lake."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
from prefect import task
from pydantic import JsonValue

from storage.lake import DatasetRef, Lake
from storage.scratch import scratch
from storage.writer import Shard
from tasks.artifacts import Cell, progress, show_stage
from tasks.errors import ConfigError
from tasks.groups import ALL, shown_group, shown_groups
from tasks.launch import revived, train_together
from tasks.models import adapter_identity, model_identity, use_threads
from tasks.pictures import show_pictures
from tasks.rows import messages_of, training_table
from tasks.settings import FinetuneConfig
from tasks.training import add_events, load_trained, model_role, offline_config, stored_references, stores_reference
from tasks.versions import Step, pin

if TYPE_CHECKING:
    from runtime.alignment.collate import EncodedPair, PreferenceRow
    from runtime.alignment.offline import PairRows
    from runtime.alignment.reference import Compute, Logps, References
    from runtime.alignment.report import TrainingReport
    from runtime.records import Progress

# Of a group's figures, those that the summary shows; the table `training` has all.
SHOWN = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin", "kl_per_token": "kl_per_token"}


def prepare(config: FinetuneConfig, lake: Lake) -> Step:
    """The step, with its pairs and models pinned."""
    inputs = {"preferences": pin(lake, config.preferences, f"preferences/{config.name}")}
    models = {"model": model_identity(config.model, model_role(config), lake)}
    if config.lora_adapter:
        models["adapter"] = adapter_identity(config.lora_adapter, lake)
    step = Step("finetune", "models", config.name, config.model_copy(update=inputs), inputs, models)
    if step.published(lake) is None:  # else it did work, and torch need not be imported, which takes seconds
        offline_config(config.model_copy(update={"lora_adapter": ""}), lake)  # what cannot work is said now
    return step


@task(name="finetune", persist_result=False)
def finetune(step: Step, lake_root: str) -> DatasetRef:
    """Train and publish the model with its training log."""
    config, lake = step.config, Lake.open(lake_root)
    assert isinstance(config, FinetuneConfig)
    use_threads(config.threads)
    rows = read_rows(step, lake)
    shown = progress(f"{step.name} finetune", "steps")
    with scratch(lake, lake.ref(step.kind, step.name, step.version)) as work:
        started = time.monotonic()
        if config.processes > 1:
            report = _revived(train_together(step, lake_root, work, {"progress": shown}))
        else:
            report = train(step, rows, lake, work, shown)
        shown.count(report.n_tokens)
        shown.show()
        writer = step.writer(lake)
        writer.add_tree(work / "model", "model")
        add_events(writer, work / "logs", config.report_to)
        writer.write(Shard("training", "train", 0, 1), training_table(report.points))
        seconds = time.monotonic() - started - report.reference_seconds
        stats = _stats(config, report) | {"seconds": round(seconds, 1)}
        ref = writer.commit(step.provenance(stats))
    show_stage(ref, stats, _group_rows(report))
    show_pictures(lake, ref)
    return ref


def preference_rows(pairs: pa.Table) -> "list[PreferenceRow]":
    """Rows of a preferences table as the trainer takes them."""
    from runtime.alignment.collate import PreferenceRow

    return [
        PreferenceRow(
            row["prompt_id"],
            row["group"],
            messages_of(row["prompt"]),
            messages_of(row["chosen"]),
            messages_of(row["rejected"]),
            row["score_margin"],
        )
        for row in pairs.to_pylist()
    ]


def read_rows(step: Step, lake: Lake) -> "PairRows":
    """The pairs to train on, and the held-out ones; ConfigError when the settings cannot work with them."""
    from runtime.alignment.offline import PairRows

    config = step.config
    assert isinstance(config, FinetuneConfig)
    source = lake.resolve(step.inputs["preferences"])
    train, test = (lake.read_table(source, "preferences", split) for split in ("train", "test"))
    if train.num_rows == 0:
        raise ConfigError(f"{source} has no pair to train on; lower test_share where it was made")
    if config.eval_steps and test.num_rows == 0:
        raise ConfigError(
            f"eval_steps = {config.eval_steps}: {source} has no held-out pair; set test_share there, or 0"
        )
    if config.reward_margin and train["score_margin"].null_count:
        raise ConfigError(f"reward_margin = {config.reward_margin}: {source} has pairs without a score margin; set 0")
    return PairRows(preference_rows(train), preference_rows(test))


def train(step: Step, rows: "PairRows", lake: Lake, work: Path, on_progress: "Progress") -> "TrainingReport":
    """Train into `work`, in this process or as one of several."""
    from runtime.alignment.config import Places
    from runtime.alignment.offline import Helpers, train_offline
    from runtime.alignment.reference import not_stored

    config = step.config
    assert isinstance(config, FinetuneConfig)
    settings = offline_config(config, lake)
    is_stored, spent = stores_reference(config, settings.loss), [0.0]
    references = _timed(stored_references(step, config, lake), spent) if is_stored else not_stored
    places = Places(work / "model", work / "checkpoints", work / "logs")
    helpers = Helpers(on_progress, references)
    report = train_offline(load_trained(config, lake), rows, settings, places, helpers)
    report.reference_seconds = spent[0]
    return report


def _revived(found: dict[str, Any]) -> "TrainingReport":
    from runtime.alignment.report import Point, TrainingReport, Warned

    return TrainingReport(**revived(found, {"points": Point, "warnings": Warned}))


def _timed(references: "References", spent: list[float]) -> "References":
    """Only the first of several trainings computes what is stored: its time is told from the training's."""

    def found(split: str, pairs: "Sequence[EncodedPair]", compute: "Compute") -> "list[Logps]":
        started = time.monotonic()
        try:
            return references(split, pairs, compute)
        finally:
            spent[0] += time.monotonic() - started

    return found


def _stats(config: FinetuneConfig, report: "TrainingReport") -> dict[str, JsonValue]:
    stats: dict[str, JsonValue] = {
        "method": config.method,
        "pairs": report.n_rows,
        "dropped": dict(report.dropped),
        **({"cut": dict(report.cut)} if report.cut else {}),
        "steps": report.steps,
        "tokens": report.n_tokens,
        "groups": {group: _shown(values) for group, values in report.groups.items() if group},
    }
    if report.n_held_out or report.held_out_dropped:
        stats["held_out_pairs"] = report.n_held_out
        stats["held_out_dropped"] = dict(report.held_out_dropped)
        groups = shown_groups(filter(None, report.held_out))
        total = {ALL: _shown(report.held_out[""])} if report.held_out else {}
        of_groups = {shown: _shown(report.held_out[group]) for group, shown in groups.items()}
        stats["held_out"] = {**total, **of_groups}
    if report.reference_seconds:
        stats["reference_seconds"] = round(report.reference_seconds, 1)
    if report.best_step is not None:
        stats["best_step"] = report.best_step
    if report.suggested_step_size is not None:
        stats["suggested_step_size"] = round(report.suggested_step_size, 6)
    if report.warnings:
        stats["warnings"] = [{"group": one.group, "warning": one.warning} for one in report.warnings]
    return stats


def _shown(values: Mapping[str, float]) -> dict[str, JsonValue]:
    found = {shown: round(values[metric], 6) for metric, shown in SHOWN.items() if metric in values}
    return {"pairs": int(values["pairs"]), **found}


def _group_rows(report: "TrainingReport") -> list[dict[str, Cell]]:
    """Training and held-out figures of every group, and what must be known about it."""
    warned = {one.group: one.warning for one in report.warnings}
    rows: list[dict[str, Cell]] = []
    for split, figures in (("train", report.groups), ("test", report.held_out)):
        for group, values in figures.items():
            shown = cast(dict[str, Cell], _shown(values))
            name = shown_group(group or None)
            rows.append({"split": split, "group": name, **shown, "warning": warned.get(group)})
    return rows
