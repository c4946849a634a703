"""Low-rank adapters: new ones, known ones, and those that would train to nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime.alignment.adapters import merged_anew
from runtime.alignment.config import LoraSettings
from runtime.alignment.losses import LossSettings
from runtime.errors import ModelError
from runtime.models import load_policy
from tests.runtime.alignment.trained import DPO, LORA, largest_difference, train, weights


def test_only_the_named_layers_are_adapted(tiny_policy_dir: Path, tmp_path: Path) -> None:
    config = replace(LORA, lora=LoraSettings(4, 8, ("q_proj", "v_proj")))
    train(load_policy(str(tiny_policy_dir)), tmp_path, config)
    before, after = weights(tiny_policy_dir), weights(tmp_path)
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "v_proj"}


def test_a_layer_that_the_model_lacks_is_named(tiny_policy_dir: Path, tmp_path: Path) -> None:
    config = replace(LORA, lora=LoraSettings(4, 8, ("query",)))
    with pytest.raises(ModelError, match="lora_targets = query: ") as caught:
        train(load_policy(str(tiny_policy_dir)), tmp_path, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["dpo", "tdpo2"])
def test_an_adapter_goes_on_measured_against_what_it_was(method: str, tiny_policy_dir: Path, tmp_path: Path) -> None:
    train(load_policy(str(tiny_policy_dir)), tmp_path / "first", LORA)
    known = LoraSettings(adapter=tmp_path / "first" / "adapter")
    config = replace(LORA, lora=known, loss=LossSettings(method), learning_rate=1e-3)  # type: ignore[arg-type]
    report = train(load_policy(str(tiny_policy_dir)), tmp_path / "second", config)
    assert abs(report.curve("rewards/margins")[0]) < 1e-4  # the policy is its own reference at first
    assert report.curve("loss")[-1] < report.curve("loss")[0]
    assert largest_difference(tmp_path / "first", tmp_path / "second") > 0
    saved = json.loads((tmp_path / "second" / "adapter" / "adapter_config.json").read_text())
    assert saved["r"] == 4
    again = merged_anew(str(tiny_policy_dir), tmp_path / "second" / "adapter", "float32").state_dict()
    assert all(torch.allclose(value, again[name], atol=1e-6) for name, value in weights(tmp_path / "second").items())


def test_a_model_whose_adapter_was_loaded_for_use_only_is_refused(tiny_policy_dir: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    train(load_policy(str(tiny_policy_dir)), tmp_path / "first", LORA)
    loaded = load_policy(str(tiny_policy_dir))
    frozen = PeftModel.from_pretrained(loaded.model, str(tmp_path / "first" / "adapter"))
    with pytest.raises(ModelError, match="no weight of the model can be trained .an adapter loaded for use only"):
        train(replace(loaded, model=frozen), tmp_path / "second", DPO)


def test_a_folder_without_an_adapter_and_one_of_another_model_are_named(tiny_policy_dir: Path, tmp_path: Path) -> None:
    config = replace(LORA, lora=LoraSettings(adapter=tmp_path))
    with pytest.raises(ModelError, match="has no adapter_config.json; give the folder of an adapter, or leave"):
        train(load_policy(str(tiny_policy_dir)), tmp_path / "out", config)
    train(load_policy(str(tiny_policy_dir)), tmp_path / "first", LORA)
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "first" / "adapter", other)
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(settings | {"r": 8}))
    with pytest.raises(ModelError, match="does not fit the model") as caught:
        train(load_policy(str(tiny_policy_dir)), tmp_path / "out", replace(LORA, lora=LoraSettings(adapter=other)))
    assert "\n" not in str(caught.value)


def test_a_training_that_moves_no_weight_is_an_error(tiny_policy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="training has not moved a single weight; raise learning_rate or epochs"):
        train(load_policy(str(tiny_policy_dir)), tmp_path, replace(DPO, learning_rate=1e-30))
    assert not (tmp_path / "model.safetensors").exists()
