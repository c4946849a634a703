from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime.alignment.collate import PreferenceRow, collate, encode_pairs
from runtime.alignment.offline import LoraSettings, OfflineConfig, train_offline
from runtime.errors import InputError, ModelError
from runtime.models import LoadedModel, load_policy
from runtime.records import Message

DPO = OfflineConfig(learning_rate=3e-3, epochs=4, batch_size=4, max_length=128)


def _rows(count: int = 10) -> list[PreferenceRow]:
    return [
        PreferenceRow(
            f"p{i}", ("child", "clerk")[i % 2], (Message("user", f"{i} + 1"),), f"yes {i}" * (1 + i % 3), f"no {i}"
        )
        for i in range(count)
    ]


def _train(folder: Path, output: Path, config: OfflineConfig) -> tuple[LoadedModel, object]:
    loaded = load_policy(str(folder))
    report = train_offline(loaded, _rows(), config, "chat", output)
    return loaded, report


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_policy(str(folder)).model.state_dict())


def test_dpo_raises_accuracy_and_margin_of_every_group(tiny_policy_dir: Path, tmp_path: Path) -> None:
    _, report = _train(tiny_policy_dir, tmp_path, DPO)
    assert report.steps == 12
    assert abs(report.log[0]["loss"] - 0.693147) < 1e-4
    assert report.log[-1]["loss"] < report.log[0]["loss"]
    assert {group: figures["accuracy"] for group, figures in report.groups.items()} == {"child": 1.0, "clerk": 1.0}


def test_sft_lowers_the_loss_of_the_chosen_answers(tiny_policy_dir: Path, tmp_path: Path) -> None:
    _, report = _train(tiny_policy_dir, tmp_path, replace(DPO, method="sft", epochs=8))
    assert report.log[-1]["loss"] < 0.8 * report.log[0]["loss"]


def test_the_same_seed_gives_the_same_weights(tiny_policy_dir: Path, tmp_path: Path) -> None:
    _train(tiny_policy_dir, tmp_path / "a", DPO)
    _train(tiny_policy_dir, tmp_path / "b", DPO)
    first, second = _weights(tmp_path / "a"), _weights(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_lora_leaves_the_base_alone_and_writes_adapter_and_merged_model(tiny_policy_dir: Path, tmp_path: Path) -> None:
    _, report = _train(tiny_policy_dir, tmp_path, replace(DPO, lora=LoraSettings(4, 8), learning_rate=1e-2))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    base, merged = _weights(tiny_policy_dir), _weights(tmp_path)
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed
    assert all("_proj" in name for name in changed)
    assert report.log[-1]["loss"] < report.log[0]["loss"]


def test_accumulated_small_batches_equal_one_large_batch(tiny_policy_dir: Path, tmp_path: Path) -> None:
    large = replace(DPO, batch_size=5, epochs=1, learning_rate=1e-3)
    small = replace(large, batch_size=1, gradient_accumulation=5)
    loaded = load_policy(str(tiny_policy_dir))
    train_offline(loaded, _rows(5), large, "chat", tmp_path / "large")
    loaded = load_policy(str(tiny_policy_dir))
    train_offline(loaded, _rows(5), small, "chat", tmp_path / "small")
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
        train_offline(load_policy(str(tiny_policy_dir)), _rows(), replace(DPO, max_length=3), "chat", tmp_path)


def test_a_diverging_run_stops_with_one_clear_line(tiny_policy_dir: Path, tmp_path: Path) -> None:
    loaded = load_policy(str(tiny_policy_dir))
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="the loss is nan at step 0; lower learning_rate"):
        train_offline(loaded, _rows(), DPO, "chat", tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
