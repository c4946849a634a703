"""On-policy training as a stage: published with its log, and mistakes in one line before anything is drawn."""

import json
import logging
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from runtime.models import load_policy
from storage.lake import DatasetRef, Lake
from tasks import align, ingest
from tasks.align import online_config
from tasks.errors import ConfigError
from tasks.settings import AlignConfig, PipelineConfig
from tests.tasks.test_chain import config

__all__ = ["config"]  # fixture

FEW: dict[str, Any] = {
    "steps": 2,
    "prompts_per_step": 3,
    "samples": 3,
    "max_new_tokens": 8,
    "learning_rate": 1e-3,
    "eval_steps": 2,
    "eval_samples": 2,
    "threads": 1,
    "report_to": "none",
}


@pytest.fixture(scope="module")
def lake(config: PipelineConfig, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """A lake with prompts."""
    lake = Lake.open(str(tmp_path_factory.mktemp("lake")))
    ingest.ingest.fn(ingest.prepare(config.stage(config.ingest)), lake.root)
    return lake


def _settings(config: PipelineConfig, **changes: Any) -> AlignConfig:
    reward = {"reward": "function", "reward_function": "tests.tasks.test_chain:answer_length"}
    values = {"name": "tiny", "model": config.finetune.model, **FEW, **reward, **changes}
    return AlignConfig.model_validate(values)


def _run(settings: AlignConfig, lake: Lake) -> DatasetRef:
    step = align.prepare(settings, lake)
    ref = align.align.fn(step, lake.root)
    assert step.published(lake) == ref
    return ref


def test_the_model_its_log_and_some_answers_are_published(config: PipelineConfig, lake: Lake) -> None:
    ref = _run(_settings(config, truth="tests.tasks.test_chain:constant"), lake)
    stats = lake.manifest(ref).stats
    assert (stats["method"], stats["steps"], stats["answers"]) == ("grpo", 2, 18)
    load_policy(str(lake.folder(ref, "model")))
    rows = lake.read_table(ref, "training").to_pylist()
    log, held_out = ([row for row in rows if row["held_out"] is which] for which in (False, True))
    assert {row["step"] for row in log if row["metric"] == "reward"} == {1, 2}
    assert {row["group"] for row in log} == {None, "a", "b", "c"}
    assert {row["step"] for row in held_out} == {0, 2}
    assert {row["value"] for row in held_out if row["metric"] == "truth"} == {1.0}
    shown = [json.loads(line) for line in (lake.folder(ref, "answers") / align.SHOWN_FILE).read_text().splitlines()]
    assert all(len(one["response"]) == one["reward"] for one in shown)
    assert {one["step"] for one in shown} == {0, 2}


@pytest.mark.parametrize("method", ["jbond", "ppo"])
def test_other_methods_are_stages_too(method: str, config: PipelineConfig, lake: Lake) -> None:
    samples = {"samples": None} if method == "jbond" else {}
    ref = _run(_settings(config, method=method, lora=True, lora_rank=2, **samples), lake)
    assert lake.manifest(ref).stats["method"] == method
    assert (lake.folder(ref, "model") / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 1}, "samples = 1: grpo compares"),
        ({"lam": 0.5}, "lam = 0.5 does nothing in grpo"),
        ({"method": "rloo", "reducer": "robust"}, "group weights work with grpo and remax"),
        ({"dtype": "bfloat16"}, "on-policy training computes in float32"),
        ({"samples": 200}, "samples = 200 is above max_rows = 128"),
    ],
)
def test_what_cannot_work_is_said_before_anything_runs(
    changes: dict[str, Any], message: str, config: PipelineConfig
) -> None:
    from runtime.errors import ConfigError as RuntimeConfigError

    with pytest.raises((ConfigError, RuntimeConfigError), match=message):
        online_config(_settings(config, **changes))


def test_an_alarm_is_logged_when_it_is_raised_and_stays_in_the_figures(
    config: PipelineConfig, lake: Lake, caplog: pytest.LogCaptureFixture
) -> None:
    """The policy learns to write small letters, which the rule calls wrong."""
    several = {"samples": 8, "prompts_per_step": 6, "steps": 16, "eval_steps": 8, "learning_rate": 1e-2}
    rules = {"reward_function": "tests.tasks.test_align:small_letters", "truth": "tests.tasks.test_align:other_letters"}
    settings = _settings(config, **several, **rules)
    with caplog.at_level(logging.INFO):
        ref = _run(settings, lake)
    told = [record.winnow for record in caplog.records if hasattr(record, "winnow")]
    alarms = [one["alarm"] for one in told if one["event"] == "reward-alarm"]
    assert any("while the truth fell from" in alarm for alarm in alarms)
    warnings = lake.manifest(ref).stats["warnings"]
    assert isinstance(warnings, list)
    assert set(alarms) <= set(warnings)


def small_letters(prompt: object, response: str) -> float:
    """The share of an answer's characters."""
    return sum(one.islower() for one in response) / max(len(response), 1)


def other_letters(prompt: object, response: str) -> float:
    """A rule that the reward contradicts."""
    return 1.0 - small_letters(prompt, response)


def test_cuts_are_refused_with_the_reason(config: PipelineConfig) -> None:
    with pytest.raises(ValidationError, match="no estimate of grpo's gradient"):
        _settings(config, cut_policy="schedule")


def test_a_constant_reward_ends_the_training_with_one_line(config: PipelineConfig, lake: Lake) -> None:
    from runtime.errors import InputError

    settings = _settings(config, reward_function="tests.tasks.test_chain:constant", steps=9)
    with pytest.raises(InputError, match="the reward was 1 for every answer of 5 steps"):
        align.align.fn(align.prepare(settings, lake), lake.root)


@pytest.mark.parametrize("changes", [{"method": "jbond", "samples": None}, {"lora": True}])
def test_drafting_changes_no_bit_of_what_is_learnt(changes: dict[str, Any], config: PipelineConfig, lake: Lake) -> None:
    settings = {"model": "starter", "eval_steps": 0, "prompts_per_step": 2, **changes}
    plain, drafted = (_run(_settings(config, s3d=s3d, **settings), lake) for s3d in ("off", "4"))
    assert plain.version != drafted.version
    first, second = (load_file(lake.folder(ref, "model") / "model.safetensors") for ref in (plain, drafted))
    assert all(torch.equal(first[name], second[name]) for name in first)
