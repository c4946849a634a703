"""A model out of the lake as a plain Hugging Face folder."""

from pathlib import Path

from prefect import task
from pydantic import JsonValue

from storage.lake import DatasetRef, Lake
from tasks.artifacts import show_stage
from tasks.errors import ModelError
from tasks.models import model_identity, model_path
from tasks.settings import ExportConfig
from tasks.versions import Step

FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


def prepare(config: ExportConfig, lake: Lake) -> Step:
    """The step, with its model pinned."""
    source = config.model or f"models/{config.name}"
    models = {"model": model_identity(source, "policy", lake)}
    pinned = config.model_copy(update={"model": models["model"] if source.startswith("models/") else source})
    return Step("export", "bundles", config.name, pinned, {}, models)


@task(name="export", persist_result=False)
def export(step: Step, lake_root: str) -> DatasetRef:
    """Copy the model's files, and nothing else, into a bundle."""
    config, lake = step.config, Lake.open(lake_root)
    assert isinstance(config, ExportConfig)
    folder = Path(model_path(config.model, "policy", lake))
    if not folder.is_dir():
        raise ModelError(f'model "{config.model}" is not a local folder; fine-tune it first or give a folder')
    writer = step.writer(lake)
    writer.add_tree(folder, "hf", FILES)
    stats: dict[str, JsonValue] = {
        "format": config.format,
        "files": len(writer.files),
        "size_bytes": sum(file.size_bytes for file in writer.files.values()),
    }
    ref = writer.commit(step.provenance(stats))
    show_stage(ref, stats, [])
    return ref
