"""Everything that an export is made of besides weights: profile, predictors, places of neurons, and what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from runtime.edge.network import shape_of
from runtime.edge.placement import HOT_FREQUENCY, HOT_SHARE, place
from runtime.edge.predictor import PredictorSettings, fit_predictors, gate_predictor
from runtime.edge.profile import ProfileSettings, cats_thresholds, profile
from runtime.edge.quality import Quality, as_stored, quality, sparse_perplexity
from runtime.edge.quantise import DEFAULT_GROUP
from runtime.edge.records import LayerPlacement, LayerPredictor, Profile, WeightFormat
from runtime.edge.text import TokenBatch, logits_of, perplexity
from runtime.errors import ConfigError, ModelError
from runtime.models import LoadedModel

# Of a SiLU layer's activations, the shares that may be left out, tried from the top.
SPARSITIES = (0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


class QualityError(ModelError):
    """An export that costs more than was promised."""


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """sparsity: of SiLU models; None is the most that keeps the promise. max_delta: promised, as a share (0.005)."""

    weight_format: WeightFormat = "bfloat16"
    group: int = DEFAULT_GROUP
    predictor: PredictorSettings = field(default_factory=PredictorSettings)
    sparsity: float | None = None
    hot_frequency: float = HOT_FREQUENCY
    hot_share: float = HOT_SHARE
    max_delta: float = 0.005


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one model under one setting."""

    profile: Profile
    predictors: tuple[LayerPredictor, ...]
    placements: tuple[LayerPlacement, ...]
    quality: Quality
    sparsity: float | None


def measure(
    loaded: LoadedModel, fitted: Sequence[TokenBatch], held_out: Sequence[TokenBatch], settings: ExportSettings
) -> Measured:
    """Calibrate on `fitted`, ask `held_out` what it costs; QualityError where that is more than promised."""
    model, shape = loaded.model, shape_of(loaded.model)
    stored = as_stored(model, settings.weight_format, settings.group)
    sparsity = settings.sparsity
    if shape.activation == "silu":
        if sparsity is None:
            sparsity = _most_sparsity(loaded, fitted, held_out, settings)
        _check_sparsity(sparsity)
    elif sparsity is not None:
        raise ConfigError(f"sparsity = {sparsity} is for silu models; relu decides by itself, leave it out")
    found = profile(model, fitted, ProfileSettings(sparsity=sparsity or 0.0, seed=settings.predictor.seed))
    thresholds = [layer.threshold for layer in found.layers]
    predictors = fit_predictors(model, fitted, thresholds, settings.predictor)
    placements = place(found, settings.hot_frequency, settings.hot_share)
    cost = quality(model, stored, (predictors, thresholds), held_out)
    check_promise(cost, settings)
    return Measured(found, predictors, placements, cost, sparsity)


def check_promise(cost: Quality, settings: ExportSettings, weights: str = "") -> None:
    """QualityError names the parts; weights: the setting that their numbers come from."""
    if cost.delta <= settings.max_delta:
        return
    by_weights = cost.stored / cost.model - 1
    weights = weights or f"weight_format = {settings.weight_format}"
    more = "lower sparsity" if settings.sparsity else "raise recall"
    fix = more if by_weights < cost.delta / 2 else f"use more bits than {weights}"
    raise _broken(cost.delta, f" ({by_weights:.2%} by {weights})", settings.max_delta, fix)


def check_engine(delta: float, settings: ExportSettings) -> None:
    """The same for what our runtime computes from a written bundle."""
    if delta > settings.max_delta:
        raise _broken(delta, " in our own runtime", settings.max_delta, "use weight_format = float32")


def _broken(delta: float, where: str, promised: float, fix: str) -> QualityError:
    return QualityError(
        f"perplexity rises by {delta:.2%}{where}, above the promised {promised:.2%}, so nothing is published; {fix}, "
        "or raise max_perplexity_delta"
    )


def _most_sparsity(
    loaded: LoadedModel, fitted: Sequence[TokenBatch], held_out: Sequence[TokenBatch], settings: ExportSettings
) -> float:
    """The largest of SPARSITIES with which perplexity stays within the promise; 0 where there is none."""
    shape, stored = shape_of(loaded.model), as_stored(loaded.model, settings.weight_format, settings.group)
    limit = perplexity(logits_of(loaded.model), held_out) * (1 + settings.max_delta)
    gates = [gate_predictor(shape)] * shape.n_layers
    for sparsity in SPARSITIES:
        thresholds = cats_thresholds(loaded.model, fitted, sparsity)
        if sparse_perplexity(stored, (gates, thresholds), held_out) <= limit:
            return sparsity
    return 0.0


def _check_sparsity(sparsity: float) -> None:
    if sparsity == 0:
        raise ConfigError(
            "this model has silu, which leaves no neuron out, and no threshold keeps the promised perplexity; "
            "set sparsity and max_perplexity_delta, fine-tune with relufy = true, or use format = gguf or hf"
        )
