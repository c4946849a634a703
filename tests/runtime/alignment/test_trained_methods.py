"""Every method trains through the one trainer; reducers, accumulation and precision do what they say."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.alignment.config import LoraSettings, OfflineConfig
from runtime.alignment.losses import LossSettings
from runtime.alignment.offline import PairRows
from runtime.errors import ConfigError, InputError
from runtime.models import load_policy
from tests.runtime.alignment.trained import DPO, LORA, ROBUST, largest_difference, rows, train

METHODS = {
    "sft": LossSettings("sft"),
    "dpo": LossSettings("dpo", label_smoothing=0.1, nll_weight=0.5),
    "ipo": LossSettings("ipo", length_norm="sum"),
    "ipo mean": LossSettings("ipo", length_norm="mean"),
    "dpop": LossSettings("dpop"),
    "tdpo1": LossSettings("tdpo1"),
    "tdpo2": LossSettings("tdpo2"),
    "orpo": LossSettings("orpo"),
    "orpo sequence": LossSettings("orpo", sft_term="sequence"),
    "simpo": LossSettings("simpo"),
    "kto": LossSettings("kto"),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_lowers_its_own_loss_on_every_group(name: str, tiny_policy_dir: Path, tmp_path: Path) -> None:
    config = replace(DPO, loss=METHODS[name], learning_rate=1e-3, epochs=6)
    report = train(load_policy(str(tiny_policy_dir)), tmp_path, config, PairRows(rows(), rows(4)))
    losses = report.curve("loss")
    assert len(losses) == 18
    assert sum(losses[-3:]) < sum(losses[:3])
    assert set(report.groups) == set(report.held_out) == {"", "child", "clerk"}
    assert all(math.isfinite(value) for figures in report.groups.values() for value in figures.values())
    assert report.held_out["child"]["pairs"] == 2


@pytest.mark.parametrize("method", ["tdpo1", "tdpo2"])
def test_with_an_adapter_the_reference_is_the_policy_without_it(
    method: str, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    config = replace(LORA, loss=LossSettings(method), epochs=1)  # type: ignore[arg-type]
    report = train(load_policy(str(tiny_policy_dir)), tmp_path, config)
    assert abs(report.curve("loss")[0] - math.log(2)) < 1e-5
    assert report.curve("kl/chosen")[0] < 1e-6 < report.curve("kl/chosen")[-1]


def test_an_adapter_measured_against_itself_equals_one_measured_against_a_frozen_copy(
    tiny_policy_dir: Path, tmp_path: Path
) -> None:
    train(load_policy(str(tiny_policy_dir)), tmp_path / "off", replace(LORA, loss=LossSettings("tdpo1")))
    # One that goes on with an adapter keeps a copy of it; started from zero it is the policy without an adapter.
    zero = replace(LORA, learning_rate=1e-30, epochs=1)
    train(load_policy(str(tiny_policy_dir)), tmp_path / "zero", zero)
    known = replace(LORA, loss=LossSettings("tdpo1"), lora=LoraSettings(adapter=tmp_path / "zero" / "adapter"))
    train(load_policy(str(tiny_policy_dir)), tmp_path / "copy", known)
    assert largest_difference(tmp_path / "off", tmp_path / "copy") < 1e-5


def test_robust_weights_move_to_the_harder_group(tiny_policy_dir: Path, tmp_path: Path) -> None:
    report = train(load_policy(str(tiny_policy_dir)), tmp_path, replace(ROBUST, learning_rate=1e-4))
    last = {group: report.curve("weight", group=group)[-1] for group in ("child", "clerk")}
    harder = max(("child", "clerk"), key=lambda group: sum(report.curve("loss", group=group)))
    assert last[harder] > 0.5 > last[min(last, key=lambda group: last[group])]
    assert abs(sum(last.values()) - 1) < 1e-9
    assert report.curve("worst/loss")[-1] == max(report.curve("loss", group=group)[-1] for group in last)
    assert report.suggested_step_size == pytest.approx(0.05 / math.log(2), rel=1e-3)


@pytest.mark.parametrize("name", ["dpo", "sft", "tdpo1"])
def test_accumulated_small_batches_equal_one_large_batch(name: str, tiny_policy_dir: Path, tmp_path: Path) -> None:
    # 4 pairs: one optimizer step, of one batch or of several. Its size is about the learning rate.
    large = replace(ROBUST, loss=LossSettings(name), batch_size=4, epochs=1, learning_rate=1e-3)  # type: ignore[arg-type]
    small = replace(large, batch_size=1, gradient_accumulation=4)
    for folder, config in (("large", large), ("small", small)):
        train(load_policy(str(tiny_policy_dir)), tmp_path / folder, config, PairRows(rows(4)))
    assert largest_difference(tmp_path / "large", tmp_path / "small") < 3e-5


def test_a_short_last_batch_weighs_its_pairs_like_all_others(tiny_policy_dir: Path, tmp_path: Path) -> None:
    large = replace(DPO, batch_size=5, epochs=1, learning_rate=1e-3)
    for folder, config in (("large", large), ("small", replace(large, batch_size=3, gradient_accumulation=2))):
        train(load_policy(str(tiny_policy_dir)), tmp_path / folder, config, PairRows(rows(5)))
    assert largest_difference(tmp_path / "large", tmp_path / "small") < 1e-5


@pytest.mark.parametrize("config", [DPO, LORA], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing(config: OfflineConfig, tiny_policy_dir: Path, tmp_path: Path) -> None:
    train(load_policy(str(tiny_policy_dir)), tmp_path / "plain", config)
    train(load_policy(str(tiny_policy_dir)), tmp_path / "checked", replace(config, gradient_checkpointing=True))
    assert largest_difference(tmp_path / "plain", tmp_path / "checked") < 1e-5


def test_bfloat16_trains_in_autocast_and_keeps_float32_weights(tiny_policy_dir: Path, tmp_path: Path) -> None:
    report = train(load_policy(str(tiny_policy_dir)), tmp_path, replace(DPO, dtype="bfloat16"))
    assert report.curve("loss")[-1] < report.curve("loss")[0]
    assert load_policy(str(tmp_path)).model.dtype.is_floating_point
    train(load_policy(str(tiny_policy_dir)), tmp_path / "float32", DPO)
    assert 0 < largest_difference(tmp_path, tmp_path / "float32") < 0.1


def test_one_group_cannot_be_the_worst_of_several(tiny_policy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='all 10 pairs are of group "child", so reducer = robust does nothing'):
        train(load_policy(str(tiny_policy_dir)), tmp_path, ROBUST, PairRows(rows(groups=("child",))))


def test_kto_needs_answers_under_other_prompts(tiny_policy_dir: Path, tmp_path: Path) -> None:
    alike = [replace(row, messages=rows(1)[0].messages) for row in rows(4)]
    with pytest.raises(InputError, match="all pairs have one prompt"):
        train(load_policy(str(tiny_policy_dir)), tmp_path, replace(DPO, loss=LossSettings("kto")), PairRows(alike))


def test_packed_rows_train_as_unpacked_ones_do(tiny_policy_dir: Path, tmp_path: Path) -> None:
    plain = replace(ROBUST, loss=LossSettings("sft"), learning_rate=1e-3, max_length=64)
    for folder, config in (("plain", plain), ("packed", replace(plain, packing=True))):
        report = train(load_policy(str(tiny_policy_dir)), tmp_path / folder, config, PairRows(rows(), rows(4)))
        assert report.held_out["clerk"]["pairs"] == 2
    assert largest_difference(tmp_path / "plain", tmp_path / "packed") < 1e-4
    with pytest.raises(ConfigError, match="packing = true: dpo compares whole rows"):
        replace(DPO, packing=True)


def test_pairs_that_max_length_cuts_are_counted(tiny_policy_dir: Path, tmp_path: Path) -> None:
    long = replace(rows(1)[0], chosen="yes " * 40)
    config = replace(DPO, max_length=64, epochs=1)
    report = train(load_policy(str(tiny_policy_dir)), tmp_path / "drop", config, PairRows([*rows(4), long]))
    assert (report.n_rows, dict(report.dropped), dict(report.cut)) == (4, {"too_long": 1}, {})
    config = replace(config, truncation="keep_start")
    report = train(load_policy(str(tiny_policy_dir)), tmp_path / "cut", config, PairRows([*rows(4), long]))
    assert (report.n_rows, dict(report.dropped), dict(report.cut)) == (5, {}, {"answer_cut": 1})
