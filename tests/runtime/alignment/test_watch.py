"""What a training looks at while it runs: held-out pairs, the worst group, numbers that are none."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime.alignment.checkpoints import last_checkpoint
from runtime.alignment.collate import encode_pairs
from runtime.alignment.config import OfflineConfig, Places, Watch
from runtime.alignment.figures import Figures
from runtime.alignment.losses import LossSettings
from runtime.alignment.offline import PairRows, train_offline
from runtime.alignment.reference import reference_logps
from runtime.alignment.trainer import DivergedError, OfflineTrainer
from runtime.errors import ConfigError, InputError
from runtime.models import LoadedModel, load_policy
from tests.runtime.alignment.trained import DPO, LORA, ROBUST, largest_difference, rows, train, weights

DATA = PairRows(rows(12), rows(6))


def test_held_out_figures_are_taken_at_the_wanted_steps_and_at_the_end(tiny_policy_dir: Path, tmp_path: Path) -> None:
    config = replace(ROBUST, watch=Watch(eval_steps=5))
    report = train(load_policy(str(tiny_policy_dir)), tmp_path, config, DATA)
    steps = [point.step for point in report.points if point.split == "test" and point.metric == "worst/loss"]
    assert steps == [5, 10, 12]
    last = {group: report.curve("loss", "test", group)[-1] for group in ("child", "clerk")}
    assert report.curve("worst/loss", "test")[-1] == max(last.values()) == report.held_out_worst
    assert report.curve("gap/loss", "test")[-1] == pytest.approx(max(last.values()) - min(last.values()))
    assert last == {group: report.held_out[group]["loss"] for group in last}


def test_looks_at_held_out_pairs_change_neither_weights_nor_group_weights(
    tiny_policy_dir: Path, tmp_path: Path
) -> None:
    looked = train(load_policy(str(tiny_policy_dir)), tmp_path / "a", replace(ROBUST, watch=Watch(eval_steps=1)), DATA)
    blind = train(load_policy(str(tiny_policy_dir)), tmp_path / "b", ROBUST, PairRows(DATA.train))
    assert largest_difference(tmp_path / "a", tmp_path / "b") == 0
    assert looked.curve("weight", group="child") == blind.curve("weight", group="child")


@pytest.mark.parametrize("config", [ROBUST, LORA], ids=["full", "lora"])
def test_early_stopping_keeps_the_weights_of_the_best_worst_group(
    config: OfflineConfig, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    # Held-out pairs want the opposite: every step makes the worst group worse.
    flipped = [replace(row, chosen=row.rejected, rejected=row.chosen) for row in rows(6)]
    config = replace(config, watch=Watch(eval_steps=1, early_stopping=2, save_steps=1), epochs=8, warmup_ratio=0.0)
    report = train(load_policy(str(tiny_policy_dir)), tmp_path, config, PairRows(DATA.train, flipped))
    losses = report.curve("worst/loss", "test")
    assert report.best_step is not None
    assert report.best_step == 1 + losses.index(min(losses))
    assert report.steps == report.best_step + 2 < 24
    assert report.held_out_worst == pytest.approx(min(losses), rel=1e-6)


def test_a_group_on_one_side_alone_is_named(tiny_policy_dir: Path, tmp_path: Path) -> None:
    data = PairRows(rows(8, ("a", "b")), rows(4, ("b", "c")))
    report = train(load_policy(str(tiny_policy_dir)), tmp_path, DPO, data)
    found = {(one.group, one.warning) for one in report.warnings}
    assert found == {("a", "trained on, but none held out"), ("c", "held out, but not trained on")}
    assert set(report.groups) == {"", "a", "b"}
    assert set(report.held_out) == {"", "b", "c"}


class _Poisoned(OfflineTrainer):
    """Its loss is no number from a given step on."""

    first = 5

    def compute_loss(self, *args: object, **kwargs: object) -> torch.Tensor:
        loss: torch.Tensor = super().compute_loss(*args, **kwargs)  # type: ignore[arg-type]
        return loss * float("nan") if self.state.global_step >= self.first else loss


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trainings end in a gradient that is no number."""
    monkeypatch.setattr("runtime.alignment.offline.OfflineTrainer", _Poisoned)
    yield


def test_a_training_that_leaves_the_numbers_keeps_its_last_good_checkpoint(
    poisoned: None, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    config = replace(DPO, watch=Watch(save_steps=2))
    places = Places(tmp_path, tmp_path / "work")
    with pytest.raises(DivergedError, match="the gradient is nan at step 5; lower learning_rate .the last good") as it:
        train_offline(load_policy(str(tiny_policy_dir)), DATA, config, places)
    kept = last_checkpoint(tmp_path / "work")
    assert kept is not None and kept.name == "checkpoint-4" and str(kept) in str(it.value)
    assert "\n" not in str(it.value)
    assert all(value.isfinite().all() for value in weights_of_checkpoint(kept, tiny_policy_dir).values())
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("save_steps", [1, 3])
def test_of_a_diverging_training_the_checkpoint_that_is_kept_is_a_good_one(
    save_steps: int, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    loss = LossSettings("ipo", length_norm="sum")
    config = replace(DPO, loss=loss, learning_rate=0.3, epochs=20, watch=Watch(save_steps=save_steps))
    with pytest.raises(DivergedError, match="the last good checkpoint is kept in") as it:
        train(load_policy(str(tiny_policy_dir)), tmp_path, config)
    named = Path(str(it.value).partition("is kept in ")[2].rstrip(")"))
    found = weights(named)
    assert all(value.isfinite().all() for value in found.values())
    begun = load_policy(str(tiny_policy_dir))
    begun.model.load_state_dict(found)
    assert _ipo_loss(begun, load_policy(str(tiny_policy_dir))) < 20 * 25  # divergence times the first loss
    assert len(list((tmp_path / "work").glob("checkpoint-*"))) <= 3


def _ipo_loss(policy: LoadedModel, reference: LoadedModel) -> float:
    """Mean over `rows()`."""
    pairs, _ = encode_pairs(rows(), policy.tokenizer, "chat", 128)
    sums = [torch.tensor(reference_logps(one.model, pairs, 0, 4)) for one in (policy, reference)]
    apart = (sums[0] - sums[1])[:, 0] - (sums[0] - sums[1])[:, 1]
    return float((apart - 5).square().mean())


class _Zero(OfflineTrainer):
    """Its groups begin with no loss at all."""

    def keep(self, split: str, figures: Figures) -> dict[str, float]:
        for values in figures.values() if self.state.global_step == 1 else ():
            values["loss"] = 0.0
        return super().keep(split, figures)


def test_a_first_loss_of_zero_loses_a_suggestion_but_not_the_training(
    tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.alignment.offline.OfflineTrainer", _Zero)
    report = train(load_policy(str(tiny_policy_dir)), tmp_path, replace(ROBUST, watch=Watch(divergence=0)))
    assert report.suggested_step_size is None
    assert (tmp_path / "model.safetensors").is_file()


def weights_of_checkpoint(checkpoint: Path, policy: Path) -> dict[str, torch.Tensor]:
    """A checkpoint has no tokenizer of its own."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).write_bytes((policy / name).read_bytes())
    return weights(checkpoint)


def test_a_loss_far_above_the_first_one_ends_the_training(tiny_policy_dir: Path, tmp_path: Path) -> None:
    config = replace(DPO, loss=LossSettings("ipo", length_norm="sum"), learning_rate=0.3, epochs=20)
    with pytest.raises(DivergedError, match=r"the loss was 25 at the first step and .* lower learning_rate, or raise"):
        train(load_policy(str(tiny_policy_dir)), tmp_path, config)
    unwatched = replace(config, watch=Watch(divergence=0))
    report = train(load_policy(str(tiny_policy_dir)), tmp_path / "on", unwatched)
    assert math.isfinite(report.curve("loss")[-1])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"early_stopping": 2}, "early_stopping = 2 needs evaluations; set eval_steps"),
        ({"early_stopping": 2, "eval_steps": 4, "save_steps": 6}, "save_steps = 6 is no multiple of eval_steps = 4"),
        ({"early_stopping": 2, "eval_steps": 4}, "save_steps = 0 is no multiple of eval_steps = 4"),
    ],
)
def test_what_cannot_be_watched_together_is_refused(settings: dict[str, int], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        Watch(**settings)


def test_evaluations_need_held_out_pairs(tiny_policy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="eval_steps = 2, but no held-out pair is left; set 0 or hold some out"):
        train(load_policy(str(tiny_policy_dir)), tmp_path, replace(DPO, watch=Watch(eval_steps=2)))


def test_a_reporter_that_is_not_installed_is_named(tiny_policy_dir: Path, tmp_path: Path) -> None:
    config = replace(DPO, watch=Watch(report_to="trackio"))
    with pytest.raises(ConfigError, match='report_to = "trackio" needs that package: pip install trackio, or set'):
        train(load_policy(str(tiny_policy_dir)), tmp_path, config)


def test_tensorboard_gets_the_figures_of_every_step_and_group(tiny_policy_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(ROBUST, watch=Watch(report_to="tensorboard", eval_steps=6))
    places = Places(tmp_path, tmp_path / "work", tmp_path / "logs")
    report = train_offline(load_policy(str(tiny_policy_dir)), DATA, config, places)
    (file,) = (tmp_path / "logs").iterdir()
    assert file.name == "part-00000.tfevents"
    assert str(tmp_path).encode() not in file.read_bytes()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    found = [event.value for event in events.Scalars("train/loss")]
    assert found == pytest.approx(report.curve("loss"))
    tags = set(events.Tags()["scalars"])
    for point in report.points:  # what the lake's table has, under the same names
        place = f"groups/{point.group}/" if point.group else ""
        assert f"{'train' if point.split == 'train' else 'eval'}/{place}{point.metric}" in tags
    assert {f"train/groups/child/{metric}" for metric in ("weight", "rewards/accuracies", "rewards/margins")} <= tags
    assert {f"eval/groups/clerk/{metric}" for metric in ("logps/chosen", "kl_per_token", "rewards/margins")} <= tags
    assert {"eval/worst/loss", "eval/gap/rewards/accuracies", "train/worst/rewards/margins"} <= tags
    found = [event.value for event in events.Scalars("train/groups/child/weight")]
    assert found == pytest.approx(report.curve("weight", group="child"))
