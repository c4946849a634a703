"""A model out of the lake: as an edge bundle, for other engines, or as a plain Hugging Face folder."""

import json
import shutil
import time
from pathlib import Path
from typing import cast

from prefect import task
from pydantic import JsonValue

from runtime.edge.architectures import check_architecture
from storage.lake import DatasetRef, Lake
from storage.schema import to_table
from storage.scratch import scratch
from storage.writer import Shard, VersionWriter
from tasks.artifacts import Cell, show_stage, show_table
from tasks.calibration_text import calibration_text, pin_text
from tasks.errors import ConfigError, ModelError
from tasks.models import load_policy_model, model_identity, model_path, use_threads
from tasks.pictures import show_pictures
from tasks.retries import RETRIES
from tasks.settings import ExportConfig
from tasks.versions import Step

FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


def prepare(config: ExportConfig, lake: Lake) -> Step:
    """The step, with its model and its calibration text pinned."""
    source = config.model or f"models/{config.name}"
    models = {"model": model_identity(source, "policy", lake)}
    if not source.startswith("models/"):
        check_format(config, source, lake)
    inputs = {} if config.format == "hf" else pin_text(config, lake)
    pinned = {**inputs, "model": models["model"] if source.startswith("models/") else source}
    return Step("export", "bundles", config.name, config.model_copy(update=pinned), inputs, models)


def check_format(config: ExportConfig, model: str, lake: Lake) -> None:
    """ModelError when what is to be exported, or trained first, has an architecture or a vocabulary that the format
    cannot hold.
    """
    path = Path(model_path(model, "policy", lake)) / "config.json"
    if config.format == "hf" or not path.is_file():
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    check_architecture(str(found.get("model_type")), str(found.get("hidden_act", found.get("hidden_activation"))))
    if config.format in ("gguf", "powerinfer"):
        from runtime.edge.gguf_vocab import vocabulary
        from runtime.models import load_tokenizer

        if isinstance(found.get("vocab_size"), int):  # loading the model says what is wrong with others
            vocabulary(load_tokenizer(str(path.parent)), found["vocab_size"])


@task(name="export", persist_result=False, **RETRIES)
def export(step: Step, lake_root: str) -> DatasetRef:
    """Write the export and publish it; refuses one that costs more than was promised."""
    config, lake = step.config, Lake.open(lake_root)
    assert isinstance(config, ExportConfig)
    folder = Path(model_path(config.model, "policy", lake))
    if not folder.is_dir():
        raise ModelError(f'model "{config.model}" is not a local folder; fine-tune it first or give a folder')
    writer = step.writer(lake)
    rows: list[dict[str, Cell]] = []
    if config.format == "hf":
        writer.add_tree(folder, "hf", FILES)
        stats = _sizes(config, writer)
    else:
        stats, rows = _measured(step, config, lake, writer)
    ref = writer.commit(step.provenance(stats))
    show_stage(ref, {key: value for key, value in stats.items() if key not in ("layers", "plans")}, rows)
    show_table(ref, "plan", cast(list[dict[str, Cell]], stats.get("plans", [])))
    show_pictures(lake, ref)
    return ref


def _measured(
    step: Step, config: ExportConfig, lake: Lake, writer: VersionWriter
) -> tuple[dict[str, JsonValue], list[dict[str, Cell]]]:
    """Calibrate, write into a folder of this machine, and take its files over."""
    from tasks.export_formats import WRITERS, edge_rows, figures

    use_threads(config.threads)
    started = time.monotonic()
    loaded = load_policy_model(model_path(config.model, "policy", lake), "float32", "cpu")
    text = calibration_text(step.inputs["candidates"], config, lake, loaded)
    with scratch(lake, lake.ref(step.kind, step.name, step.version)) as work:
        folder = work / config.format
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir()
        except OSError as error:
            raise ConfigError(f'"{folder}" cannot be written: {error.strerror}; check the disk') from error
        made = WRITERS[config.format](folder, loaded, text, config)
        writer.add_tree(folder, config.format)
    found = list(edge_rows(made.measured)) if made.measured else []
    if found:
        writer.write(Shard("edge", "train", 0, 1), to_table("edge", found))
    stats = _sizes(config, writer) | figures(made.quality) | {"texts": text.n_texts, "dropped": text.n_dropped}
    if made.measured and made.measured.sparsity is not None:
        stats["sparsity"] = made.measured.sparsity
    if made.engine_delta is not None:
        stats["perplexity_delta_in_runtime"] = round(made.engine_delta, 6)
    layers, plans = _layers(found), [dict(row) for row in made.plans]
    stats |= {"plans": cast(JsonValue, plans)} if plans else {}
    stats |= {"layers": cast(JsonValue, layers)} if layers else {}
    return stats | {"seconds": round(time.monotonic() - started, 1)}, layers


def _sizes(config: ExportConfig, writer: VersionWriter) -> dict[str, JsonValue]:
    files = [file for file in writer.files.values() if file.table is None]
    return {"format": config.format, "files": len(files), "size_bytes": sum(file.size_bytes for file in files)}


def _layers(rows: list[dict[str, object]]) -> list[dict[str, Cell]]:
    """One row per layer, of the figures that are no points of a curve."""
    found: dict[int, dict[str, Cell]] = {}
    for row in rows:
        layer, value = cast(int, row["layer"]), cast(float, row["value"])
        if row["x"] is None:
            found.setdefault(layer, {"layer": layer})[str(row["metric"])] = round(value, 4)
    return list(found.values())
