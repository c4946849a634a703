"""A training killed at any step and started again ends in the same bits as an undisturbed one."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.alignment.checkpoints import last_checkpoint, read_state, write_state
from runtime.alignment.config import LoraSettings, Places, Watch
from runtime.alignment.offline import Helpers, PairRows, train_offline
from runtime.models import load_policy
from tests.runtime.alignment.trained import CONFIGS, largest_difference, rows, train

ROOT = Path(__file__).parents[3]
TRAIN_LOSS = ("train", None, "loss")


def _run(kind: str, model: Path, output: Path, killed_at: int = 0) -> int:
    command = [sys.executable, "-m", "tests.runtime.alignment.trained", kind, str(model), str(output), "3"]
    done = subprocess.run([*command, str(killed_at)], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.mark.slow
def test_a_killed_training_that_is_resumed_gives_the_same_bits(tiny_policy_dir: Path, tmp_path: Path) -> None:
    assert _run("full", tiny_policy_dir, tmp_path / "undisturbed") == 0
    for step in (5, 14):
        assert _run("full", tiny_policy_dir, tmp_path / "killed", step) == -signal.SIGKILL
        assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert _run("full", tiny_policy_dir, tmp_path / "killed") == 0
    assert largest_difference(tmp_path / "undisturbed", tmp_path / "killed") == 0
    first, second = (json.loads((tmp_path / run / "report.json").read_text()) for run in ("undisturbed", "killed"))
    assert first == second
    losses = [step for step, split, group, metric, _ in first["points"] if (split, group, metric) == TRAIN_LOSS]
    assert losses == list(range(1, 17))
    weights = [value for *_, group, metric, value in first["points"] if (group, metric) == ("child", "weight")]
    assert len(set(weights)) == 16


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("kto", "continued adapter", "early stopping")]


@pytest.mark.parametrize("kind", ["lora", "token level", "accumulated", *SLOW])
def test_a_training_stopped_anywhere_goes_on_as_if_nothing_had_been(
    kind: str, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    data = PairRows(rows(16), rows(6))
    if kind == "early stopping":  # held-out pairs want the opposite: the first look is the best
        flipped = [replace(row, chosen=row.rejected, rejected=row.chosen) for row in data.test]
        data = replace(data, test=flipped)
    if kind == "continued adapter":
        train(load_policy(str(tiny_policy_dir)), tmp_path / "before", CONFIGS["lora"])
        known = LoraSettings(adapter=tmp_path / "before" / "adapter")
        config = replace(CONFIGS["lora"], lora=known, learning_rate=3e-3)
    else:
        config = CONFIGS[kind]
    config = replace(config, watch=replace(config.watch, eval_steps=2, save_steps=2))
    whole = train(load_policy(str(tiny_policy_dir)), tmp_path / "whole", config, data)
    places = Places(tmp_path / "parts", tmp_path / "parts" / "work")
    for stop in (3, 5):

        def stopped(done: int, total: int, stop: int = stop) -> None:
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_offline(load_policy(str(tiny_policy_dir)), data, config, places, Helpers(stopped))
    parts = train_offline(load_policy(str(tiny_policy_dir)), data, config, places)
    assert largest_difference(places.output, tmp_path / "whole") == 0
    assert parts == whole
    assert (parts.steps < 12) == (kind == "early stopping")


@pytest.mark.parametrize("stop", [1, 5])  # before the first checkpoint, and behind one
def test_event_files_of_a_resumed_training_have_every_step_once(
    stop: int, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(CONFIGS["full"], watch=Watch(save_steps=2, report_to="tensorboard"))
    places = Places(tmp_path, tmp_path / "work", tmp_path / "logs")

    def stopped(done: int, total: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_offline(load_policy(str(tiny_policy_dir)), PairRows(rows(16)), config, places, Helpers(stopped))
    report = train_offline(load_policy(str(tiny_policy_dir)), PairRows(rows(16)), config, places)
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    found = events.Scalars("train/loss")
    assert [event.step for event in found] == list(range(1, 17))
    assert [event.value for event in found] == pytest.approx(report.curve("loss"))


def test_a_checkpoint_without_its_mark_is_not_resumed_from(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert last_checkpoint(tmp_path) is None
    for step in (2, 9):
        write_state(tmp_path / f"checkpoint-{step}", {"step": step})
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert read_state(tmp_path / "checkpoint-9") == {"step": 9}
