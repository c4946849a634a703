"""Every on-policy method raises a reward that can be raised, goes on exactly, and says what is wrong in one line."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runtime.alignment.config import LoraSettings, Places
from runtime.alignment.groups import GroupSettings
from runtime.alignment.online.loop import Task, train_online
from runtime.alignment.online.rollout import Drawing, PromptOrder
from runtime.alignment.online.settings import OnlineSettings
from runtime.alignment.online.training import OnlineConfig, OnlineReport
from runtime.errors import ConfigError, InputError, ModelError
from runtime.models import load_policy
from runtime.records import Message, Prompt
from runtime.rewards.verifier import FunctionReward

PROMPTS = [Prompt(f"p{i}", (Message("user", f"Say {i}."),), "ab"[i % 2]) for i in range(12)]
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"samples": 8},
    "rloo": {"samples": 8},
    "ppo": {"samples": 8, "epochs": 2, "minibatches": 2, "kl_coef": 0.0},
    "remax": {"samples": 8, "kl_coef": 0.0},
    "jbond": {"anchor_rate": 0.1},
    "bond": {"samples": 4, "bond_n": 8, "bond_samples": 8},
}
# J-BOND learns from one answer per prompt and a signal that seldom fires; BOND's reward ends at the reference's best.
STEPS = {"jbond": 40, "bond": 30}


def lower(prompt: Prompt, response: str) -> float:
    """The share of an answer's characters that are small letters; ASCII has 26 of 256 bytes."""
    return sum(c.islower() and c.isascii() for c in response) / max(len(response), 1)


def config(method: str = "grpo", **changes: Any) -> OnlineConfig:
    """Short answers of a tiny policy."""
    drawing = Drawing(max_new_tokens=10, prompt_format="text", max_rows=64)
    settings = OnlineSettings(method=method, **METHODS[method])  # type: ignore[arg-type]
    base = OnlineConfig(settings, drawing, steps=3, prompts_per_step=6, learning_rate=1e-2, rows=20)
    return replace(base, **changes)


def train(
    folder: Path,
    model: Path,
    settings: OnlineConfig,
    reward: Callable[[Prompt, str], float] = lower,
    prompts: Sequence[Prompt] = PROMPTS,
    stop: int = 0,
) -> OnlineReport:
    """Train a fresh copy; a run that is told to stop is interrupted behind that step."""

    def on_progress(done: int, total: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    task = Task(prompts, FunctionReward(reward, "test"), prompts[:4], lower)
    return train_online(load_policy(str(model)), task, settings, Places(folder, folder / "work"), on_progress)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_raises_the_reward(method: str, tiny_policy_dir: Path, tmp_path: Path) -> None:
    steps = STEPS.get(method, 20)
    report = train(tmp_path, tiny_policy_dir, config(method, steps=steps, eval_steps=steps))
    before, after = report.curve("reward", "test")
    assert after > before + 0.1
    assert report.curve("kl", "test")[0] == pytest.approx(0, abs=1e-4)
    assert report.curve("kl", "test")[1] > 0
    assert (tmp_path / "model.safetensors").is_file()
    assert len(report.curve("grad_norm")) == steps


@pytest.mark.parametrize(
    ("method", "lora"),
    [
        ("grpo", None),
        ("ppo", None),
        ("jbond", None),
        ("jbond", LoraSettings(rank=4)),
        *(pytest.param(method, LoraSettings(rank=4), marks=pytest.mark.slow) for method in ("grpo", "ppo", "bond")),
        *(pytest.param(method, None, marks=pytest.mark.slow) for method in ("rloo", "remax", "bond")),
    ],
)
def test_a_training_stopped_anywhere_goes_on_to_the_same_bits(
    method: str, lora: LoraSettings | None, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    settings = config(method, steps=4, save_steps=1, eval_steps=2, lora=lora)
    whole = train(tmp_path / "whole", tiny_policy_dir, settings)
    for stop in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", tiny_policy_dir, settings, stop=stop)
    parts = train(tmp_path / "parts", tiny_policy_dir, settings)
    first, second = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole == parts


def test_group_weights_rise_for_the_group_with_low_rewards(tiny_policy_dir: Path, tmp_path: Path) -> None:
    def partial(prompt: Prompt, response: str) -> float:
        return lower(prompt, response) - (2.0 if prompt.group == "b" else 0.0)

    settings = config(steps=5)
    robust = replace(settings.method, group_weights=GroupSettings("robust", 0.2))
    report = train(tmp_path, tiny_policy_dir, replace(settings, method=robust), partial)
    weights = report.curve("weight", group="b")
    assert weights == sorted(weights)
    assert weights[-1] > 0.6
    assert report.curve("weight", group="a")[-1] == pytest.approx(1 - weights[-1])


def test_passes_of_other_sizes_give_the_same_weights(tiny_policy_dir: Path, tmp_path: Path) -> None:
    for rows in (8, 48):
        train(tmp_path / str(rows), tiny_policy_dir, config(rows=rows, steps=2))
    first, second = (load_file(tmp_path / rows / "model.safetensors") for rows in ("8", "48"))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=2e-4, rtol=1e-3)


def test_an_answer_that_cannot_be_scored_counts_for_nothing_and_is_counted(
    tiny_policy_dir: Path, tmp_path: Path
) -> None:
    calls = []

    def moody(prompt: Prompt, response: str) -> float:
        calls.append(response)
        if len(calls) % 3 == 0:
            raise RuntimeError("no mood")
        return lower(prompt, response) if len(calls) % 3 == 1 else math.nan

    report = train(tmp_path, tiny_policy_dir, config(steps=2), moody)
    assert report.n_answers == 2 * 48
    assert report.unscored == {
        "test failed: RuntimeError: no mood": 32,
        "reward is nan, not a finite number": 32,
    }


def test_rewards_that_are_all_missing_or_all_alike_end_the_training(tiny_policy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no answer of step 0 could be scored: .*RuntimeError: never"):
        train(tmp_path / "none", tiny_policy_dir, config(), _never)
    with pytest.raises(InputError, match=r"the reward was 1 for every answer of 5 steps"):
        train(tmp_path / "alike", tiny_policy_dir, config(steps=9), lambda prompt, response: 1.0)


def _never(prompt: Prompt, response: str) -> float:
    raise RuntimeError("never")


def test_a_checkpoint_of_another_training_is_refused(tiny_policy_dir: Path, tmp_path: Path) -> None:
    settings = config("ppo", steps=2, save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, tiny_policy_dir, settings, stop=2)
    with pytest.raises(ModelError, match=r"value_head.* is \(.*\), but this training has not there"):
        train(tmp_path, tiny_policy_dir, config("grpo", steps=2))


def test_answers_that_never_end_are_counted_and_may_be_punished(tiny_policy_dir: Path, tmp_path: Path) -> None:
    plain = train(tmp_path / "a", tiny_policy_dir, config(steps=1))
    assert 0 < plain.truncated <= 48
    settings = config(steps=1)
    strict = replace(settings, drawing=replace(settings.drawing, eos_penalty=3.0))
    punished = train(tmp_path / "b", tiny_policy_dir, strict)
    assert punished.truncated == plain.truncated
    lost = plain.curve("reward")[0] - punished.curve("reward")[0]
    assert lost == pytest.approx(3.0 * plain.truncated / 48, abs=1e-5)


def test_every_prompt_is_taken_once_per_epoch_in_another_order() -> None:
    order = PromptOrder(PROMPTS, 4, 0)
    epochs = [[p.prompt_id for step in range(3 * epoch, 3 * epoch + 3) for p in order.at(step)] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(p.prompt_id for p in PROMPTS)
    assert epochs[0] != epochs[1]
    with pytest.raises(InputError, match="no prompt"):
        PromptOrder([], 4, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OnlineSettings("grpo", samples=1), "samples = 1: grpo compares the answers"),
        (lambda: OnlineSettings("jbond", samples=2), "jbond draws one answer"),
        (lambda: OnlineSettings("dpo"), 'method = "dpo"; choose one of'),  # type: ignore[arg-type]
        (lambda: OnlineSettings("grpo", lam=0.5), "lam = 0.5 does nothing in grpo"),
        (lambda: OnlineSettings("ppo", group_weights=GroupSettings("robust")), "group weights work with grpo and"),
        (lambda: OnlineSettings("ppo", gamma=1.5), "gamma = 1.5"),
        (lambda: OnlineSettings("ppo", kl_coef=-1.0), "kl_coef = -1.0"),
        (lambda: OnlineSettings("ppo", kl_coef=0.0, kl_target=1.0), "both must be above 0"),
        (lambda: OnlineSettings("bond", bond_n=1), "bond_n = 1"),
        (lambda: OnlineSettings("bond", bond_n=32), "bond_samples = 16 must hold bond_n = 32"),
        (lambda: OnlineConfig(drawing=Drawing(temperature=0)), "temperature = 0"),
        (lambda: OnlineConfig(OnlineSettings("jbond"), prompts_per_step=1), "baseline is the mean"),
        (lambda: OnlineConfig(OnlineSettings(samples=200)), "samples = 200 is above max_rows"),
        (lambda: OnlineConfig(steps=0), "steps = 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
