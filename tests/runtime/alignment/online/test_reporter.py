"""Figures that go to a tracker get there under the names that offline training has."""

from pathlib import Path

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from runtime.errors import ConfigError
from tests.runtime.alignment.online.test_loop import config, train


class _Tracker(TrainerCallback):
    """Stands in for W&B's callback, which is not installed."""

    heard: list[tuple[int, dict[str, float]]]
    ended: int

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """With what the real one shows as the run's settings."""
        assert args.learning_rate == 1e-2 and args.max_steps == 2 and kwargs["model"] is not None
        type(self).heard, type(self).ended = [], 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """A step or an evaluation."""
        self.heard.append((state.global_step, logs or {}))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Once."""
        type(self).ended += 1


def test_a_tracker_hears_of_every_step_and_evaluation(
    tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", _Tracker)
    monkeypatch.setattr("runtime.alignment.arguments.find_spec", lambda name: object())
    report = train(tmp_path, tiny_policy_dir, config(steps=2, eval_steps=2, report_to="wandb"))
    heard = {(step, name): value for step, logs in _Tracker.heard for name, value in logs.items()}
    assert [step for step, _ in _Tracker.heard] == [0, 1, 2, 2] and _Tracker.ended == 1
    assert len(heard) == len(report.points)
    for point in report.points:
        place = f"groups/{point.group}/" if point.group else ""
        name = f"{'eval_' if point.split == 'test' else ''}{place}{point.metric}"
        assert heard[point.step, name] == point.value


def test_a_tracker_that_is_not_installed_is_named(
    tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.alignment.arguments.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match='report_to = "wandb" needs that package: pip install wandb, or set'):
        train(tmp_path, tiny_policy_dir, config(report_to="wandb"))
