from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from runtime.alignment.arguments import training_arguments
from runtime.alignment.collate import PreferenceRow, collate, encode_pairs
from runtime.alignment.config import LoraSettings, OfflineConfig, Places
from runtime.alignment.losses import LossSettings
from runtime.alignment.offline import PairRows, train_offline
from runtime.alignment.report import TrainingReport
from runtime.errors import ConfigError, InputError, ModelError
from runtime.models import LoadedModel, load_policy
from runtime.records import Message
from tests.conftest import byte_tokenizer
from tests.runtime.alignment.tiny_models import tiny_model

DPO = OfflineConfig(learning_rate=3e-3, epochs=4, batch_size=4, max_length=128)


def _rows(count: int = 10) -> list[PreferenceRow]:
    return [
        PreferenceRow(
            f"p{i}", ("child", "clerk")[i % 2], (Message("user", f"{i} + 1"),), f"yes {i}" * (1 + i % 3), f"no {i}"
        )
        for i in range(count)
    ]


def _train(folder: Path, output: Path, config: OfflineConfig, count: int = 10) -> TrainingReport:
    return train_offline(load_policy(str(folder)), PairRows(_rows(count)), config, Places(output, output / "work"))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_policy(str(folder)).model.state_dict())


def test_dpo_raises_accuracy_and_margin_of_every_group(tiny_policy_dir: Path, tmp_path: Path) -> None:
    report = _train(tiny_policy_dir, tmp_path, DPO)
    assert report.steps == 12
    assert abs(report.curve("loss")[0] - 0.693147) < 1e-4
    assert report.curve("loss")[-1] < report.curve("loss")[0]
    assert {g: values["rewards/accuracies"] for g, values in report.groups.items()} == {
        "": 1.0,
        "child": 1.0,
        "clerk": 1.0,
    }


def test_sft_lowers_the_loss_of_the_chosen_answers(tiny_policy_dir: Path, tmp_path: Path) -> None:
    report = _train(tiny_policy_dir, tmp_path, replace(DPO, loss=LossSettings("sft"), epochs=8))
    assert report.curve("loss")[-1] < 0.8 * report.curve("loss")[0]


def test_the_same_seed_gives_the_same_weights(tiny_policy_dir: Path, tmp_path: Path) -> None:
    _train(tiny_policy_dir, tmp_path / "a", DPO)
    _train(tiny_policy_dir, tmp_path / "b", DPO)
    first, second = _weights(tmp_path / "a"), _weights(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_lora_leaves_the_base_alone_and_writes_adapter_and_merged_model(tiny_policy_dir: Path, tmp_path: Path) -> None:
    report = _train(tiny_policy_dir, tmp_path, replace(DPO, lora=LoraSettings(4, 8), learning_rate=1e-2))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    base, merged = _weights(tiny_policy_dir), _weights(tmp_path)
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed
    assert all("_proj" in name for name in changed)
    assert report.curve("loss")[-1] < report.curve("loss")[0]


def test_accumulated_small_batches_equal_one_large_batch(tiny_policy_dir: Path, tmp_path: Path) -> None:
    large = replace(DPO, batch_size=5, epochs=1, learning_rate=1e-3)
    small = replace(large, batch_size=1, gradient_accumulation=5)
    _train(tiny_policy_dir, tmp_path / "large", large, 5)
    _train(tiny_policy_dir, tmp_path / "small", small, 5)
    first, second = _weights(tmp_path / "large"), _weights(tmp_path / "small")
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-5


def test_rows_that_cannot_be_trained_on_are_dropped_with_a_reason(tiny_policy: LoadedModel) -> None:
    row = _rows(1)[0]
    rows = [row, replace(row, chosen=""), replace(row, rejected=row.chosen), replace(row, rejected="x" * 500)]
    pairs, dropped = encode_pairs(rows, tiny_policy.tokenizer, "chat", max_length=64)
    assert len(pairs) == 1
    assert dropped == {"empty_answer": 1, "equal_answers": 1, "too_long": 1}


def test_only_answer_tokens_and_the_end_token_are_trained_on(tiny_policy: LoadedModel) -> None:
    row = _rows(1)[0]
    pairs, _ = encode_pairs([row], tiny_policy.tokenizer, "chat", max_length=64)
    batch = collate(pairs, tiny_policy.tokenizer.pad_token_id, with_rejected=True)
    shown = [
        tiny_policy.tokenizer.decode(ids[flags]) for ids, flags in zip(batch.token_ids, batch.is_answer, strict=True)
    ]
    assert shown == [f"{row.chosen}<end>", f"{row.rejected}<end>"]


def test_no_row_left_is_one_clear_line(tiny_policy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="10 prompt_too_long"):
        _train(tiny_policy_dir, tmp_path, replace(DPO, max_length=3))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_more_tokens_than_the_model_has_positions_are_one_clear_line(architecture: str, tmp_path: Path) -> None:
    loaded = LoadedModel(tiny_model(architecture), byte_tokenizer(), "some/model", "")
    with pytest.raises(ConfigError, match="max_length = 128 is more than the 64 positions of 'some/model'; set max_le"):
        train_offline(loaded, PairRows(_rows()), DPO, Places(tmp_path, tmp_path / "work"))


def test_a_process_that_sees_several_gpus_uses_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = training_arguments(DPO, 10, Places(tmp_path, tmp_path / "work"), torch.device("cpu"))
    assert found.n_gpu == 0
    # As if transformers had found two before it was told of one.
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda arguments: vars(arguments)["_n_gpu"] or 2))
    found = training_arguments(DPO, 10, Places(tmp_path, tmp_path / "work"), torch.device("cpu"))
    assert found.n_gpu == 1 and found.train_batch_size == DPO.batch_size


def test_a_diverging_run_stops_with_one_clear_line(tiny_policy_dir: Path, tmp_path: Path) -> None:
    loaded = load_policy(str(tiny_policy_dir))
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="the loss is nan at step 0; lower learning_rate"):
        train_offline(loaded, PairRows(_rows()), DPO, Places(tmp_path, tmp_path / "work"))
    assert not (tmp_path / "model.safetensors").exists()
