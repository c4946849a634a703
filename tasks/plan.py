"""Every stage of a pipeline with its version, known before anything runs, and what running it would take."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from storage.lake import Lake
from tasks import assemble, evaluate, export, finetune, generate, ingest, score
from tasks.errors import ConfigError
from tasks.models import model_path
from tasks.settings import CONNECTED, ChainConfig, EvaluateConfig, GenerateConfig
from tasks.versions import Step

STAGES = ("ingest", "generate", "score", "assemble", "finetune", "evaluate", "export")


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage: where its result goes, whether it is there, and upper bounds of its work (None: not known yet)."""

    stage: str
    ref: str
    is_cached: bool
    n_prompts: int | None
    n_candidates: int | None
    max_new_tokens: int | None
    kv_bytes: int | None


def check_connections(config: ChainConfig) -> None:
    """Raise ConfigError when the configuration sets an input that the pipeline connects itself, or trains no policy."""
    if config.finetune.method == "reward":
        raise ConfigError(
            'config: finetune.method = "reward": a pipeline trains a policy; run `winnow finetune` for a reward model'
        )
    for stage, fields in CONNECTED.items():
        for field in fields:
            settings = getattr(config, stage)
            value = getattr(settings, field)
            if value != type(settings).model_fields[field].default:
                raise ConfigError(
                    f'config: {stage}.{field} = "{value}": a pipeline connects its stages itself; leave it out'
                )


def steps(config: ChainConfig, lake: Lake) -> dict[str, Step]:
    """All stages, connected; nothing is run and nothing needs to exist but the source and the models."""
    check_connections(config)
    first = ingest.prepare(config.stage(config.ingest))
    prompts = first.ref_text
    drawn = generate.prepare(config.stage(config.generate, prompts=prompts), lake)
    scored = score.prepare(config.stage(config.score, candidates=drawn.ref_text), lake)
    paired = assemble.prepare(config.stage(config.assemble, candidates=scored.ref_text), lake)
    trained = finetune.prepare(config.stage(config.finetune, preferences=paired.ref_text), lake)
    after = {"prompts": prompts, "before": config.finetune.model, "after": trained.ref_text}
    compared = evaluate.prepare(config.stage(config.evaluate, **after), lake)
    export.check_format(config.export, config.finetune.model, lake)
    leaving = export_inputs(config, trained.ref_text, scored.ref_text)
    exported = export.prepare(config.stage(config.export, **leaving), lake)
    return dict(zip(STAGES, (first, drawn, scored, paired, trained, compared, exported), strict=True))


def export_inputs(config: ChainConfig, model: str, candidates: str) -> dict[str, str]:
    """What the export of a pipeline is connected to: a plain folder needs no text to calibrate on."""
    return {"model": model} | ({} if config.export.format == "hf" else {"candidates": candidates})


def plan(config: ChainConfig, lake: Lake) -> list[StagePlan]:
    """What `steps` would do on this lake."""
    all_steps = steps(config, lake)
    return [_plan(step, lake, all_steps["ingest"]) for step in all_steps.values()]


def _plan(step: Step, lake: Lake, source: Step) -> StagePlan:
    n_prompts = n_candidates = n_tokens = kv_bytes = None
    config = step.config
    if isinstance(config, GenerateConfig | EvaluateConfig):
        n_prompts = _count_prompts(source, lake, "prompts" if step.stage == "generate" else "heldout")
        per_prompt = config.n if isinstance(config, GenerateConfig) else 2 * config.samples
        n_candidates = None if n_prompts is None else n_prompts * per_prompt
        n_tokens = None if n_candidates is None else n_candidates * config.max_new_tokens
        model = config.model if isinstance(config, GenerateConfig) else config.before
        kv_bytes = _kv_bytes(model, lake, config)
    is_cached = step.published(lake) is not None
    return StagePlan(step.stage, step.ref_text, is_cached, n_prompts, n_candidates, n_tokens, kv_bytes)


def _count_prompts(step: Step, lake: Lake, which: str) -> int | None:
    ref = step.published(lake)
    return cast(int, lake.manifest(ref).stats[which]) if ref else None


def _kv_bytes(model: str, lake: Lake, config: GenerateConfig | EvaluateConfig) -> int | None:
    """Upper bound of keys and values: the budget, or every row at the model's full context.

    None for a model that is not here.
    """
    try:
        path = Path(model_path(model, "policy", lake)) / "config.json"
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    heads = found["num_attention_heads"]
    head_dim = found.get("head_dim") or found["hidden_size"] // heads
    per_token = 2 * found["num_hidden_layers"] * found.get("num_key_value_heads", heads) * head_dim
    width = 2 if config.dtype == "bfloat16" else 4
    bound = int(per_token * width * config.max_rows * found["max_position_embeddings"])
    budget = config.kv_budget_mb if isinstance(config, GenerateConfig) else None
    return bound if budget is None else min(bound, budget * 1_000_000)
