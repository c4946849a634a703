"""How an on-policy training goes and ends: what is kept of one that runs away, what is said, what is steered."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.alignment.checkpoints import last_checkpoint
from runtime.alignment.config import Places
from runtime.alignment.groups import GroupSettings
from runtime.alignment.online.loop import KL_STEERING, Task, train_online
from runtime.alignment.online.settings import OnlineSettings
from runtime.alignment.online.training import Look
from runtime.alignment.trainer import DivergedError
from runtime.errors import ConfigError, InputError, ModelError
from runtime.models import load_policy
from runtime.records import Prompt
from runtime.rewards.verifier import FunctionReward
from tests.runtime.alignment.online.test_loop import METHODS, PROMPTS, config, lower, train

RUNAWAY: dict[str, Any] = {"kl_limit": 0.5, "learning_rate": 2e-4, "warmup_ratio": 0.0}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_checkpoint_kept_of_a_runaway_is_of_a_step_that_was_near_its_reference(
    tiny_policy_dir: Path, tmp_path: Path
) -> None:
    settings = config(steps=30, save_steps=1, **RUNAWAY)
    with pytest.raises(DivergedError, match=r"above kl_limit = 0.5.*is kept in") as caught:
        train(tmp_path / "lost", tiny_policy_dir, settings)
    kept = last_checkpoint(tmp_path / "lost" / "work")
    assert kept is not None and str(kept) in str(caught.value)
    n_good = int(kept.name.rpartition("-")[2])
    assert f"after {n_good + 1} steps" in str(caught.value)
    found = load_file(kept / "online.safetensors")
    train(tmp_path / "good", tiny_policy_dir, replace(settings, steps=n_good))  # whose end passes the same check
    for name, weight in _weights(tmp_path / "good").items():
        assert torch.equal(found[f"weight.{name}"], weight)
    calmer = replace(settings, steps=n_good + 2, learning_rate=1e-4, kl_limit=5.0)
    assert train(tmp_path / "lost", tiny_policy_dir, calmer).steps == n_good + 2


@pytest.mark.parametrize("eval_steps", [0, 1])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e30}, "lower learning_rate"),
        ({"kl_limit": 1e-3, "learning_rate": 1e-2}, "after 1 steps, above kl_limit = 0.001"),
    ],
)
def test_the_last_update_is_checked_before_anything_is_published(
    changes: dict[str, float], message: str, eval_steps: int, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    settings = config(steps=1, save_steps=1, eval_steps=eval_steps, **RUNAWAY | changes)
    with pytest.raises(DivergedError, match=rf"{message}.*\(there was no checkpoint yet\)"):
        train(tmp_path, tiny_policy_dir, settings)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_solved_task_ends_early_with_a_warning_and_is_published(tiny_policy_dir: Path, tmp_path: Path) -> None:
    n_calls = 0

    def solved_after_two(prompt: Prompt, response: str) -> float:
        nonlocal n_calls
        n_calls += 1
        return lower(prompt, response) if n_calls <= 2 * 48 + 16 else 1.0  # 48 answers a step, 16 held-out ones

    settings = config(steps=20, save_steps=1, eval_steps=20)
    report = train(tmp_path, tiny_policy_dir, settings, solved_after_two)
    assert report.steps == 6  # two that taught something, four of the five that did not
    assert [one.warning for one in report.warnings][:1] == [
        "the reward was 1 for every answer of 5 steps, which teach nothing more: the training ended after 6 of 20 steps"
    ]
    assert {point.step for point in report.points if point.split == "test"} == {0, 6}
    assert len(_weights(tmp_path)) > 0


def test_an_error_late_in_a_training_names_the_last_checkpoint(tiny_policy_dir: Path, tmp_path: Path) -> None:
    n_calls = 0

    def breaks(prompt: Prompt, response: str) -> float:
        nonlocal n_calls
        n_calls += 1
        if n_calls > 2 * 48:
            raise RuntimeError("gone")
        return lower(prompt, response)

    with pytest.raises(InputError, match=r"no answer of step 2 could be scored.*is kept in .*checkpoint-2\)"):
        train(tmp_path, tiny_policy_dir, config(steps=5, save_steps=1), breaks)


def test_figures_are_means_of_the_answers_that_were_scored(tiny_policy_dir: Path, tmp_path: Path) -> None:
    n_calls = 0

    def half(prompt: Prompt, response: str) -> float:
        nonlocal n_calls
        n_calls += 1
        if n_calls % 2:
            raise RuntimeError("no mood")
        return 5.0 + lower(prompt, response)

    settings = config(steps=1, eval_steps=1)
    report = train(tmp_path, tiny_policy_dir, settings, half)
    for split in ("train", "test"):
        for group in (None, "a", "b"):
            assert all(5.0 <= value <= 6.0 for value in report.curve("reward", split, group))
    assert report.held_out_unscored == {"test failed: RuntimeError: no mood": 16}
    assert report.unscored == {"test failed: RuntimeError: no mood": 24}
    ends = [report.held_out[group]["reward"] for group in ("a", "b")]
    assert report.held_out[""]["worst/reward"] == min(ends)
    assert report.held_out[""]["gap/reward"] == max(ends) - min(ends)


def test_below_both_is_a_share_of_the_answers_that_count(tiny_policy_dir: Path, tmp_path: Path) -> None:
    n_calls = 0

    def sinking(prompt: Prompt, response: str) -> float:
        nonlocal n_calls
        n_calls += 1
        if n_calls <= 3:  # of six answers, which come before the anchor's
            raise RuntimeError("no mood")
        return -1.0 if n_calls <= 6 else float(n_calls)

    report = train(tmp_path, tiny_policy_dir, config("jbond", steps=1), sinking)
    assert report.curve("below_both") == [1.0]


def test_a_step_without_a_lesson_keeps_its_figures(tiny_policy_dir: Path, tmp_path: Path) -> None:
    """Every prompt's answers have one reward, so that skip_equal leaves them all out; prompts differ."""
    settings = config(steps=2)
    skipping = replace(settings, method=replace(settings.method, skip_equal=True, minibatches=2))
    report = train(tmp_path, tiny_policy_dir, skipping, lambda prompt, response: float(prompt.prompt_id[1:]))
    for metric in ("reward", "kl", "entropy", "tokens"):
        assert len(report.curve(metric)) == 2
    assert report.curve("equal_rewards") == [1.0, 1.0]
    assert report.curve("loss") == report.curve("grad_norm") == []
    first, last = load_file(tiny_policy_dir / "model.safetensors"), _weights(tmp_path)
    assert all(torch.equal(first[name], last[name]) for name in first)
    diverged = replace(skipping, kl_limit=1e-12)
    with pytest.raises(DivergedError, match="above kl_limit"):
        train(tmp_path / "checked", tiny_policy_dir, replace(diverged, learning_rate=1e-2, steps=3), _by_length)


def _by_length(prompt: Prompt, response: str) -> float:
    return float(len(response))


def test_skipped_prompts_teach_nothing_and_the_others_do(tiny_policy_dir: Path, tmp_path: Path) -> None:
    def only_a(prompt: Prompt, response: str) -> float:
        return lower(prompt, response) if prompt.group == "a" else 0.5

    settings = config(steps=1)
    skipping = replace(settings, method=replace(settings.method, skip_equal=True, kl_coef=0.0))
    report = train(tmp_path / "all", tiny_policy_dir, skipping, only_a)
    assert len(report.curve("loss", group="a")) == 1
    assert report.curve("loss", group="b") == []
    assert report.curve("reward", group="b") == [0.5]
    of_a = [prompt for prompt in PROMPTS if prompt.group == "a"]
    assert 0 < report.curve("equal_rewards")[0] < 1 and of_a


@pytest.mark.parametrize(("target", "sign"), [(1e-6, 1), (1e6, -1)])
def test_the_coefficient_follows_the_divergence_at_most_so_fast(
    target: float, sign: int, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    settings = config("rloo", steps=4)
    steered = replace(settings, method=replace(settings.method, kl_coef=0.1, kl_target=target))
    found = train(tmp_path, tiny_policy_dir, steered).curve("kl_coef")
    most, rate = KL_STEERING
    assert found[0] == 0.1
    # The first divergence is that of equal models, which is below every target but for rounding.
    for before, after in zip(found[1:], found[2:], strict=False):
        assert after == pytest.approx(before * (1 + sign * rate * most))


def test_a_coefficient_near_its_target_moves_in_proportion(tiny_policy_dir: Path, tmp_path: Path) -> None:
    settings = config("rloo", steps=3)
    plain = replace(settings, method=replace(settings.method, kl_coef=0.1, kl_target=1e6))
    kl = train(tmp_path / "plain", tiny_policy_dir, plain).curve("kl")
    target = kl[1] / 1.1
    close = replace(settings, method=replace(settings.method, kl_coef=0.1, kl_target=target))
    found = train(tmp_path / "close", tiny_policy_dir, close)
    assert found.curve("kl")[:2] == kl[:2]
    assert found.curve("kl_coef")[2] == pytest.approx(found.curve("kl_coef")[1] * 1.01)


@pytest.mark.parametrize("method", ["grpo", "remax"])
def test_a_training_stopped_between_saves_keeps_weights_of_groups_and_coefficient(
    method: str, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    settings = config(method, steps=5, save_steps=2)
    changes: dict[str, Any] = {"kl_coef": 0.1, "kl_target": 1.0} if method == "remax" else {}
    robust = replace(settings.method, group_weights=GroupSettings("robust", 0.2), **changes)
    settings = replace(settings, method=robust)
    whole = train(tmp_path / "whole", tiny_policy_dir, settings)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", tiny_policy_dir, settings, stop=3)
    assert [path.name for path in (tmp_path / "parts" / "work").iterdir()] == ["checkpoint-2"]
    parts = train(tmp_path / "parts", tiny_policy_dir, settings)
    assert whole == parts
    assert len(set(whole.curve("weight", group="a"))) == 5
    assert len(set(whole.curve("kl_coef"))) == (5 if changes else 1)
    first, second = _weights(tmp_path / "whole"), _weights(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_value_head_of_another_shape_is_one_line(tiny_policy_dir: Path, tmp_path: Path) -> None:
    settings = config("ppo", steps=3, save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, tiny_policy_dir, settings, stop=2)
    kept = last_checkpoint(tmp_path / "work")
    assert kept is not None
    tensors = load_file(kept / "online.safetensors")
    save_file(tensors | {"weight.value_head.weight": torch.zeros(1, 7)}, kept / "online.safetensors")
    with pytest.raises(ModelError, match=r"value_head.weight is \(1, 7\), but this training has \(1, 32\); remove it"):
        train(tmp_path, tiny_policy_dir, settings)


def test_a_truth_rule_that_fails_costs_that_row_alone(tiny_policy_dir: Path, tmp_path: Path) -> None:
    n_calls = 0

    def moody(prompt: Prompt, response: str) -> float:
        nonlocal n_calls
        n_calls += 1
        if n_calls % 4 == 1:
            raise RuntimeError("no mood")
        return math.nan if n_calls % 4 == 2 else 1.0

    task = Task(PROMPTS, FunctionReward(lower, "test"), PROMPTS[:4], moody)
    places = Places(tmp_path, tmp_path / "work")
    report = train_online(load_policy(str(tiny_policy_dir)), task, config(steps=1, eval_steps=1), places)
    assert report.curve("truth", "test") == [1.0, 1.0]
    assert report.held_out_unscored == {
        "no truth: the rule failed: RuntimeError: no mood": 8,
        "no truth: reward is nan, not a finite number": 8,
    }
    assert {one.truth for one in report.shown} == {None}  # the first answer to each prompt


def test_answers_that_seldom_end_are_warned_of(tiny_policy_dir: Path, tmp_path: Path) -> None:
    settings = config(steps=1)
    short = replace(settings, drawing=replace(settings.drawing, max_new_tokens=1))
    report = train(tmp_path, tiny_policy_dir, short)
    assert len(report.warnings) == 1
    assert "of the last answers did not end within max_new_tokens = 1; raise it" in report.warnings[0].warning


def test_every_evaluation_is_told_of_with_its_alarms(tiny_policy_dir: Path, tmp_path: Path) -> None:
    looks: list[Look] = []
    task = Task(PROMPTS, FunctionReward(lower, "test"), PROMPTS[:4], lambda p, r: 1.0 - lower(p, r), looks.append)
    settings = config(steps=20, eval_steps=10)
    report = train_online(load_policy(str(tiny_policy_dir)), task, settings, Places(tmp_path, tmp_path / "work"))
    assert [look.step for look in looks] == [0, 10, 20]
    assert [one for look in looks for one in look.shown] == report.shown
    alarms = [one for look in looks for one in look.alarms]
    assert any("while the truth fell" in one.warning for one in alarms)
    assert {one.warning for one in alarms} <= {one.warning for one in report.warnings}


def test_what_shares_a_step_is_weighed_by_the_prompts_there_are(tiny_policy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is 1 prompt, but jbond's baseline is the mean of the others"):
        train(tmp_path, tiny_policy_dir, config("jbond"), prompts=PROMPTS[:1])
    settings = replace(config(), method=OnlineSettings(**METHODS["grpo"], minibatches=4))
    with pytest.raises(ConfigError, match=r"a step has 3 prompts, but 1 processes with minibatches = 4"):
        train(tmp_path, tiny_policy_dir, settings, prompts=PROMPTS[:3])
    report = train(tmp_path, tiny_policy_dir, replace(settings, steps=1), prompts=PROMPTS[:5])
    assert len(report.curve("grad_norm")) == 1
