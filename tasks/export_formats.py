"""What is written in each format of an export, into a local folder; and what it costs, measured on what was written."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tasks.calibration_text import CalibrationText
from tasks.settings import ExportConfig

if TYPE_CHECKING:
    from runtime.edge.measure import ExportSettings, Measured
    from runtime.edge.quality import Quality
    from runtime.models import LoadedModel

CURVE_POINTS = 32
GGUF_FILE, POWERINFER_FILE = "model.gguf", "model.powerinfer.gguf"


@dataclass(frozen=True, slots=True)
class Made:
    """An export in a folder: its cost, what was measured of the neurons, and cost and memory in our own runtime."""

    quality: "Quality"
    measured: "Measured | None" = None
    engine_delta: float | None = None
    plans: Sequence[Mapping[str, float | int]] = ()


def edge_settings(config: ExportConfig) -> "ExportSettings":
    """The runtime's settings."""
    from runtime.edge.measure import ExportSettings
    from runtime.edge.predictor import PredictorSettings

    kind = config.predictor
    if config.format == "powerinfer" and kind == "auto":
        kind = "low_rank"  # the format has no gates without predictors
    return ExportSettings(
        weight_format=config.weight_format if config.format == "bundle" else "float32",
        group=config.group,
        predictor=PredictorSettings(
            kind, config.rank, config.recall, n_samples=config.calibration_tokens, seed=config.seed
        ),
        sparsity=config.sparsity,
        hot_frequency=config.hot_frequency,
        hot_share=config.hot_share,
        max_delta=config.max_perplexity_delta / 100,
    )


def write_bundle(folder: Path, loaded: "LoadedModel", text: CalibrationText, config: ExportConfig) -> Made:
    """For our own runtime."""
    from runtime.edge.bundle_write import Contents
    from runtime.edge.bundle_write import write_bundle as write
    from runtime.edge.measure import check_engine, measure
    from runtime.edge.quality import engine_delta

    settings = edge_settings(config)
    found = measure(loaded, text.fitted, text.held_out, settings)
    promise = {"promised_delta": config.max_perplexity_delta / 100}
    contents = Contents(
        model=loaded.model,
        profile=found.profile,
        predictors=found.predictors,
        placements=found.placements,
        tokenizer=Path(loaded.source),
        weight_format=config.weight_format,
        group=config.group,
        quality=figures(found.quality) | promise,
    )
    manifest = write(folder, contents)
    delta = engine_delta(folder, loaded.model, text.held_out)
    check_engine(delta, settings)
    plans = cast(Sequence[Mapping[str, float | int]], manifest.plan["shares"])
    return Made(found.quality, found, delta, plans)


def write_powerinfer(folder: Path, loaded: "LoadedModel", text: CalibrationText, config: ExportConfig) -> Made:
    """PowerInfer's file, measured as it was written."""
    from runtime.edge import gguf
    from runtime.edge.gguf_gpuidx import write_gpuidx
    from runtime.edge.gguf_read import sparse_model
    from runtime.edge.gguf_weights import Sparsity
    from runtime.edge.measure import check_promise, measure
    from runtime.edge.quality import quality

    settings = edge_settings(config)
    gguf.check_powerinfer(loaded, config.gguf_type)  # before an hour of calibration
    found = measure(loaded, text.fitted, text.held_out, settings)
    sparsity = Sparsity(found.predictors, found.placements)
    path = folder / POWERINFER_FILE
    gguf.write_powerinfer(path, loaded, sparsity, gguf.GgufSettings(config.gguf_type, config.name))
    row = 2 * loaded.model.config.hidden_size  # gate, up and down of a neuron, at most F16
    hot_bytes = sum(3 * row * placement.n_hot for placement in found.placements)
    write_gpuidx(path.with_name(f"{path.name}.generated.gpuidx"), found.placements, hot_bytes)
    model, predictors = sparse_model(path, loaded.model)
    cost = quality(loaded.model, model, (predictors, [0.0] * len(predictors)), text.held_out)
    check_promise(cost, settings, f"gguf_type = {config.gguf_type}")
    return Made(cost, found)


def write_gguf(folder: Path, loaded: "LoadedModel", text: CalibrationText, config: ExportConfig) -> Made:
    """A plain file, measured as transformers reads it."""
    from runtime.edge import gguf
    from runtime.edge.gguf_read import dense_model
    from runtime.edge.measure import check_promise
    from runtime.edge.quality import Quality
    from runtime.edge.text import logits_of, perplexity

    path = folder / GGUF_FILE
    gguf.write_gguf(path, loaded, gguf.GgufSettings(config.gguf_type, config.name))
    own, other = (perplexity(logits_of(model), text.held_out) for model in (loaded.model, dense_model(path)))
    n_tokens = sum(int(batch.is_asked.sum()) for batch in text.held_out)
    cost = Quality(own, other, other, n_tokens)
    check_promise(cost, edge_settings(config), f"gguf_type = {config.gguf_type}")
    return Made(cost)


WRITERS: Mapping[str, Callable[[Path, "LoadedModel", CalibrationText, ExportConfig], Made]] = {
    "bundle": write_bundle,
    "powerinfer": write_powerinfer,
    "gguf": write_gguf,
}


def figures(cost: "Quality") -> dict[str, float | int]:
    """Of a quality, as they are stored."""
    return {
        "perplexity": round(cost.model, 6),
        "perplexity_stored": round(cost.stored, 6),
        "perplexity_exported": round(cost.exported, 6),
        "perplexity_delta": round(cost.delta, 6),
        "held_out_tokens": cost.n_tokens,
    }


def edge_rows(found: "Measured") -> Iterator[dict[str, object]]:
    """Rows of the table `edge`: the curve of frequencies of every layer, and its figures."""
    import numpy as np

    parts = zip(found.profile.layers, found.predictors, found.placements, strict=True)
    for index, (layer, predictor, placement) in enumerate(parts):
        curve = np.sort(layer.frequency)[::-1]
        places = np.unique(np.linspace(0, len(curve) - 1, CURVE_POINTS).astype(int))
        for place in places:
            x = (float(place) + 1) / len(curve)
            yield {"layer": index, "metric": "frequency", "x": x, "value": float(curve[place])}
        single = {
            "active": float(layer.frequency.mean()),
            "threshold": layer.threshold,
            "hot": placement.n_hot / len(curve),
            "recall": predictor.recall,
            "predicted": predictor.predicted_active,
            "predictor_bytes": 2.0 * (predictor.fc1.numel() + predictor.fc2.numel()),
        }
        for metric, value in single.items():
            yield {"layer": index, "metric": metric, "x": None, "value": float(value)}
