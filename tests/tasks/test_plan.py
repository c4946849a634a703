"""Every field of every stage determines the version of that stage and of those after it, and of no other."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from storage.lake import Lake
from tasks.errors import ConfigError
from tasks.plan import STAGES, plan, steps
from tasks.settings import PipelineConfig

AFTER = {
    "ingest": set(STAGES),
    "generate": {"generate", "score", "assemble", "finetune", "evaluate", "export"},
    "score": {"score", "assemble", "finetune", "evaluate", "export"},
    "assemble": {"assemble", "finetune", "evaluate", "export"},
    "finetune": {"finetune", "evaluate", "export"},
    "evaluate": {"evaluate"},
    "export": {"export"},
}
# Set by the pipeline itself.
CONNECTED = {"name", "prompts", "candidates", "preferences", "before", "after"}
SINGLE_CHOICE = {("export", "model")}
# Read by reward models alone, which a pipeline does not train: see test_finetune.py.
OF_REWARD_MODELS = {("finetune", "reward_margin"), ("finetune", "reward_prefixes")}
OTHERS: dict[str, object] = {
    "format": "jsonl",
    "messages_column": "turns",
    "prompt_column": "text",
    "system_prompt": "be brief",
    "reference_column": "answer",
    "group_column": "who",
    "group_constant": "us",
    "group_rules": ["a=b"],
    "license": "mit",
    "language": "en",
    "max_prompts": 5,
    "max_heldout": 5,
    "reward": "likelihood",
    "prompt_format": "text",
    "dtype": "bfloat16",
    "device": "auto",
    "cut_policy": "none",
    "cut_tokens": [5, 9],
    "cut_keep": [0.4, 0.4],
    "cut_target": 0.5,
    "calibration": "candidates/other",
    "confidence": 0.9,
    "first_wave": 4,
    "reward_terms": ["0.5*likelihood:starter"],
    "server_extra": ["top_k=50"],
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "stop": ["\n\n"],
    "kv_budget_mb": 64,
    "strategy": "best_vs_second",
    "max_pairs_per_group": 3,
    "max_pairs_per_prompt": 3,
    "normalisation": "zscore",
    "truncated": "drop",
    "min_tokens": 2,
    "max_tokens": 90,
    "near_duplicates": 0.8,
    "languages": ["en"],
    "evaluation_sets": ["prompts/other@0123456789ab"],
    "group_quotas": ["child=5"],
    "balance": "smallest",
    "method": "sft",
    "lora": True,
    "beta": 0.3,
    "preset": "trl",
    "length_norm": "mean",
    "sft_term": "sequence",
    "simpo_gamma": 0.5,
    "chi": 0.5,
    "reducer": "importance",
    "gradient_checkpointing": True,
    "lora_targets": ["q_proj"],
    "report_to": "none",
    "truncation": "keep_end",
    "processes": 2,
    "packing": True,
    "relufy": True,
    "reference": "anew",
    "truth": "none",
    "s3d": "4",
    "s3d_adapter": "elsewhere",
    "weight_format": "int8",
    "group": 64,
    "gguf_type": "Q8_0",
    "predictor": "mlp",
    "recall": 0.9,
    "sparsity": 0.5,
}
# A value that nothing reads is refused: it needs what reads it.
READERS: dict[str, dict[str, object]] = {
    "length_norm": {"method": "ipo", "length_norm": "sum"},
    "dpop_lambda": {"method": "dpop"},
    "tdpo_alpha": {"method": "tdpo2"},
    "orpo_lambda": {"method": "orpo"},
    "sft_term": {"method": "orpo"},
    "simpo_gamma": {"method": "simpo"},
    "desirable_weight": {"method": "kto"},
    "undesirable_weight": {"method": "kto"},
    **{name: {"reducer": "robust"} for name in ("step_size", "chi", "adjustment")},
    **{name: {"lora": True} for name in ("lora_rank", "lora_alpha", "lora_targets", "lora_adapter", "lora_4bit")},
    "early_stopping": {"eval_steps": 100},
    "packing": {"method": "sft"},
    "relufy": {"method": "sft"},
    "gguf_type": {"format": "gguf"},
}


def _versions(config: dict[str, object], lake: Lake) -> dict[str, str]:
    return {stage: step.version for stage, step in steps(PipelineConfig.model_validate(config), lake).items()}


def _fields() -> list[tuple[str, str]]:
    fields = []
    for stage in STAGES:
        model = PipelineConfig.model_fields[stage].annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        fields += [(stage, name) for name in model.model_fields if name not in CONNECTED]
    return [field for field in fields if field not in SINGLE_CHOICE | OF_REWARD_MODELS]


def _flipped(stage: str, name: str, models: dict[str, str]) -> dict[str, object]:
    if name == "reward_function":
        return {"reward": "function", name: "runtime.starter.rule:truth"}
    if name in ("server", "server_model"):
        return {"server": "http://127.0.0.1:1/v1", "server_model": "m"}
    if (stage, name) == ("export", "format"):
        return {name: "hf"}
    if name in OTHERS:
        return {name: OTHERS[name]}
    if name in models:
        return {name: models[name]}
    default = PipelineConfig().__getattribute__(stage).__getattribute__(name)
    if isinstance(default, int | float):
        return {name: default + 1 if isinstance(default, int) else default + 0.25}
    raise AssertionError(f"{stage}.{name}: add another value to OTHERS")


@pytest.mark.parametrize(("stage", "name"), _fields())
def test_flipping_a_field_changes_its_stage_and_those_after_it_only(
    stage: str, name: str, tmp_path: Path, tiny_policy_dir: Path, tiny_reward_dir: Path
) -> None:
    source = tmp_path / "other.jsonl"
    source.write_text('{"prompt": "x"}\n')
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / file).write_bytes(b"{}")
    others = {
        "model": str(tiny_policy_dir),
        "lora_adapter": str(adapter),
        "reward_model": str(tiny_reward_dir),
        "source": str(source),
    }
    others["dataset_split"] = "validation"
    lake = Lake.open(str(tmp_path / "lake"))
    base = {"evaluate": {"truth": "starter"}}
    readers = READERS.get(name, {})
    base[stage] = {**base.get(stage, {}), **readers}
    changed = {**base, stage: {**base[stage], **_flipped(stage, name, others)}}
    before, after = _versions(dict(base), lake), _versions(changed, lake)
    moved = {each for each in STAGES if before[each] != after[each]}
    assert moved == AFTER[stage]
    assert not (tmp_path / "lake").exists()


def test_changed_bytes_of_a_source_or_a_model_are_another_version(tmp_path: Path, tiny_policy_dir: Path) -> None:
    import shutil

    source, model = tmp_path / "p.jsonl", tmp_path / "model"
    source.write_text('{"prompt": "x"}\n')
    shutil.copytree(tiny_policy_dir, model)
    lake = Lake.open(str(tmp_path / "lake"))
    config = {"ingest": {"source": str(source)}, "generate": {"model": str(model)}}
    first = _versions(dict(config), lake)
    source.write_text('{"prompt": "y"}\n')
    assert _versions(dict(config), lake)["ingest"] != first["ingest"]
    source.write_text('{"prompt": "x"}\n')
    (model / "generation_config.json").write_text("{}")
    second = _versions(dict(config), lake)
    assert second["ingest"] == first["ingest"]
    assert second["generate"] != first["generate"]


def test_the_name_of_the_pipeline_moves_everything(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    first, second = _versions({}, lake), _versions({"name": "other"}, lake)
    assert all(first[stage] != second[stage] for stage in STAGES)


def test_a_plan_knows_versions_and_bounds_before_anything_ran(tmp_path: Path) -> None:
    plans = {p.stage: p for p in plan(PipelineConfig(), Lake.open(str(tmp_path / "lake")))}
    assert not any(p.is_cached for p in plans.values())
    assert plans["generate"].n_prompts is None
    assert plans["generate"].kv_bytes == 2 * 8 * 2 * 32 * 4 * 128 * 256


def test_an_input_that_the_pipeline_connects_itself_is_refused(tmp_path: Path) -> None:
    config = PipelineConfig.model_validate({"generate": {"prompts": "prompts/x"}})
    with pytest.raises(ConfigError, match='generate.prompts = "prompts/x": a pipeline connects its stages itself'):
        steps(config, Lake.open(str(tmp_path / "lake")))


IMPORTS = """
import sys
from storage.lake import Lake
from tasks import finetune
from tasks.plan import STAGES, steps
from tasks.settings import PipelineConfig

finetune.offline_config = None  # called for what is not published alone
finetune.Step.published = lambda step, lake: step.version
found = steps(PipelineConfig(name="n", generate={"s3d": "auto"}), Lake.open(sys.argv[1]))
assert tuple(found) == STAGES
print({"torch", "transformers"} & set(sys.modules))
"""


def test_that_everything_is_in_the_lake_is_known_without_torch(tmp_path: Path) -> None:
    """Its import takes longer than all else that a night without anything new does."""
    done = subprocess.run([sys.executable, "-c", IMPORTS, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr
