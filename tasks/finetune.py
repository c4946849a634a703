"""Training the policy on preference pairs; the result is a plain Hugging Face folder in the lake."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pyarrow as pa
from prefect import task
from pydantic import JsonValue

from storage.lake import DatasetRef, Lake
from storage.schema import to_table
from storage.writer import Shard
from tasks.artifacts import Cell, progress, show_stage
from tasks.errors import ConfigError
from tasks.models import model_identity, model_path, use_threads
from tasks.pictures import show_picture
from tasks.rows import messages_of
from tasks.settings import FinetuneConfig
from tasks.versions import Step, pin

if TYPE_CHECKING:
    from runtime.alignment.collate import PreferenceRow
    from runtime.alignment.offline import OfflineConfig, TrainingReport


def prepare(config: FinetuneConfig, lake: Lake) -> Step:
    """The step, with its pairs and policy pinned."""
    inputs = {"preferences": pin(lake, config.preferences, f"preferences/{config.name}")}
    models = {"model": model_identity(config.model, "policy", lake)}
    return Step("finetune", "models", config.name, config.model_copy(update=inputs), inputs, models)


@task(name="finetune", persist_result=False)
def finetune(step: Step, lake_root: str) -> DatasetRef:
    """Train and publish the model with its training log."""
    from runtime.alignment.offline import train_offline
    from runtime.hardware import pick_device
    from runtime.models import load_policy

    config, lake = step.config, Lake.open(lake_root)
    assert isinstance(config, FinetuneConfig)
    use_threads(config.threads)
    pairs = lake.read_table(lake.resolve(step.inputs["preferences"]), "preferences", "train")
    if pairs.num_rows == 0:
        raise ConfigError(f"{step.inputs['preferences']} has no pair to train on; lower test_share where it was made")
    # Loaded anew, not from the process's cache: training changes the weights.
    policy = load_policy(model_path(config.model, "policy", lake), "float32", pick_device(config.device))
    with tempfile.TemporaryDirectory(prefix="winnow-finetune-") as folder:
        report = train_offline(
            policy,
            preference_rows(pairs),
            _offline_config(config),
            config.prompt_format,
            Path(folder),
            progress(f"{step.name} finetune"),
        )
        writer = step.writer(lake)
        writer.add_tree(Path(folder), "model")
    writer.write(Shard("training", "train", 0, 1), to_table("training", _log_rows(report)))
    stats: dict[str, JsonValue] = {
        "method": config.method,
        "pairs": report.n_rows,
        "dropped": dict(report.dropped),
        "steps": report.steps,
        "groups": {group: dict(values) for group, values in report.groups.items()},
    }
    ref = writer.commit(step.provenance(stats))
    groups: list[dict[str, Cell]] = [{"group": group, **values} for group, values in report.groups.items()]
    show_stage(ref, stats, groups)
    show_picture(lake, ref)
    return ref


def preference_rows(pairs: pa.Table) -> "list[PreferenceRow]":
    """Rows of a preferences table as the trainer takes them."""
    from runtime.alignment.collate import PreferenceRow

    return [
        PreferenceRow(
            row["prompt_id"],
            row["group"],
            messages_of(row["prompt"]),
            row["chosen"][-1]["content"],
            row["rejected"][-1]["content"],
        )
        for row in pairs.to_pylist()
    ]


def _offline_config(config: FinetuneConfig) -> "OfflineConfig":
    from runtime.alignment.offline import LoraSettings, OfflineConfig

    shared = config.model_dump(include=set(OfflineConfig.__dataclass_fields__) - {"lora"})
    lora = LoraSettings(config.lora_rank, config.lora_alpha) if config.lora else None
    return OfflineConfig(**shared, lora=lora)


def _log_rows(report: "TrainingReport") -> list[dict[str, object]]:
    return [
        {"step": int(entry["step"]), "metric": metric, "value": float(value)}
        for entry in report.log
        for metric, value in sorted(entry.items())
        if metric != "step" and isinstance(cast(object, value), int | float)
    ]
