"""Reward models: the loss, beginnings of answers, and a result that scores."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime.alignment.config import LoraSettings, OfflineConfig, RewardSettings
from runtime.alignment.encode import encode_pairs
from runtime.alignment.groups import GroupSettings
from runtime.alignment.items import Item
from runtime.alignment.offline import PairRows
from runtime.alignment.reward import bradley_terry, closed, closing_ids, with_prefixes
from runtime.errors import ConfigError, ModelError
from runtime.models import LoadedModel, encode_answer, load_classifier, load_reward_start
from runtime.records import Message, Prompt
from runtime.rewards.classifier import ClassifierReward
from tests.runtime.alignment.trained import rows, train

REWARD = OfflineConfig(RewardSettings(), learning_rate=3e-3, epochs=6, batch_size=4, max_length=128)


def test_the_loss_is_bradley_terry_with_a_margin() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, margin = torch.randn(3, 9, generator=generator, dtype=torch.float64) * 3
    found = bradley_terry(chosen, rejected, margin)
    for i in range(9):
        apart = (chosen[i] - rejected[i]).item()
        assert found.per_sample[i].item() == pytest.approx(math.log1p(math.exp(margin[i] - apart)), abs=1e-12)
        assert found.metrics["rewards/accuracies"][i] == float(apart > 0)


def test_the_gradient_is_that_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    chosen, rejected, margin = torch.randn(3, 9, generator=generator, dtype=torch.float64) * 3
    chosen.requires_grad_(True), rejected.requires_grad_(True)
    weights = torch.linspace(-1, 2, 9, dtype=torch.float64)
    (bradley_terry(chosen, rejected, margin).per_sample * weights).sum().backward()
    for i in range(9):
        apart = (chosen[i] - rejected[i] - margin[i]).item()
        wanted = weights[i].item() * -1 / (1 + math.exp(apart))  # -(1 - sigmoid(r_w - r_l - margin))
        assert chosen.grad is not None and rejected.grad is not None
        assert chosen.grad[i].item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
        assert rejected.grad[i].item() == pytest.approx(-wanted, rel=1e-9, abs=1e-12)


def test_beginnings_differ_are_shorter_and_end_as_partial_answers_do(tiny_policy: LoadedModel) -> None:
    tokenizer = tiny_policy.tokenizer
    pairs, _ = encode_pairs(rows(), tokenizer, "chat", 128)
    closing = closing_ids(tokenizer, "chat")
    assert closing == [tokenizer.eos_token_id]
    items = [Item(pair, 0, margin=1.0) for pair in pairs]
    found = with_prefixes(items, 3, closing, seed=0)
    assert len(found) == 4 * len(items)
    assert found == with_prefixes(items, 3, closing, seed=0) != with_prefixes(items, 3, closing, seed=1)
    for place, item in enumerate(found):
        whole = items[place // 4].pair
        if place % 4:
            assert item.margin == 0.0
            assert item.pair.length < whole.length
            assert item.pair.chosen != item.pair.rejected
            for cut, full in ((item.pair.chosen, whole.chosen), (item.pair.rejected, whole.rejected)):
                assert cut[-1:] == closing and full[: len(cut) - 1] == cut[:-1]


def test_a_pair_that_differs_in_its_last_token_alone_has_no_beginnings(tiny_policy: LoadedModel) -> None:
    row = replace(rows(1)[0], chosen="abc", rejected="abd")
    pairs, _ = encode_pairs([row], tiny_policy.tokenizer, "chat", 128)
    items = [Item(pairs[0], 0)]
    assert with_prefixes(items, 2, closing_ids(tiny_policy.tokenizer, "chat"), seed=0) == items


def test_answers_end_as_they_do_when_they_are_scored(make_tokenizer: object) -> None:
    tokenizer = make_tokenizer()  # type: ignore[operator]
    tokenizer.chat_template = tokenizer.chat_template.replace("<end>{% endfor %}", "<end>\n{% endfor %}")
    row = rows(1)[0]
    pairs, _ = encode_pairs([row], tokenizer, "chat", 128)
    (item,) = closed([Item(pairs[0], 0)], closing_ids(tokenizer, "chat"))
    assert item.pair.chosen == encode_answer(tokenizer, row.messages, str(row.chosen), "chat")[0]
    assert len(item.pair.chosen) > len(pairs[0].chosen)


@pytest.mark.parametrize("lora", [None, LoraSettings(4, 8)], ids=["full", "lora"])
def test_a_reward_model_from_a_policy_ranks_whole_answers_and_beginnings(
    lora: LoraSettings | None, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    config = replace(REWARD, lora=lora, learning_rate=3e-3 if lora is None else 1e-2)
    report = train(load_reward_start(str(tiny_policy_dir)), tmp_path, config, PairRows(rows(16), rows(8)))
    assert {group: values["rewards/accuracies"] for group, values in report.held_out.items()} == {
        "": 1.0,
        "child": 1.0,
        "clerk": 1.0,
    }
    reward = ClassifierReward(load_classifier(str(tmp_path)))
    prompts = [Prompt(str(i), (Message("user", f"{i} + 1"),), "child") for i in range(6)]
    scored = reward.score(prompts * 2, [f"yes {i}" for i in range(6)] + [f"no {i}" for i in range(6)])
    values = [score.value for score in scored]
    assert None not in values
    assert all(good > bad for good, bad in zip(values[:6], values[6:], strict=True))  # type: ignore[operator]
    begun = [score.value for score in reward.score(prompts * 2, ["y"] * 6 + ["n"] * 6)]
    assert sum(good > bad for good, bad in zip(begun[:6], begun[6:], strict=True)) == 6  # type: ignore[operator]


def test_the_margin_of_a_pair_asks_for_more(tiny_reward_dir: Path, tmp_path: Path) -> None:
    plain = replace(REWARD, loss=RewardSettings(prefixes=0), epochs=1)
    first = train(load_reward_start(str(tiny_reward_dir)), tmp_path / "plain", plain)
    asked = replace(plain, loss=RewardSettings(margin=2.0, prefixes=0))
    second = train(load_reward_start(str(tiny_reward_dir)), tmp_path / "margin", asked)
    assert second.curve("loss")[0] > first.curve("loss")[0] + 1


def test_reward_models_can_be_trained_for_the_worst_group(tiny_reward_dir: Path, tmp_path: Path) -> None:
    config = replace(REWARD, groups=GroupSettings("robust", step_size=0.5))
    report = train(load_reward_start(str(tiny_reward_dir)), tmp_path, config)
    assert len(set(report.curve("weight", group="child"))) > 6


def test_a_head_is_new_the_same_for_a_seed_and_alone_new(tiny_policy_dir: Path, tmp_path: Path) -> None:
    first, again, other = (load_reward_start(str(tiny_policy_dir), seed=seed).model.state_dict() for seed in (0, 0, 1))
    assert torch.equal(first["score.weight"], again["score.weight"])
    assert not torch.equal(first["score.weight"], other["score.weight"])
    assert all(torch.equal(first[name], other[name]) for name in first if name != "score.weight")
    with pytest.raises(ModelError, match="has no .*safetensors file"):
        load_reward_start(str(_config_only(tiny_policy_dir, tmp_path)))


def _config_only(policy: Path, folder: Path) -> Path:
    (folder / "config.json").write_bytes((policy / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("margin", "prefixes", "line"), [(-1.0, 1, "reward_margin = -1.0"), (0.0, -1, "reward_prefixes = -1")]
)
def test_impossible_reward_settings_are_refused(margin: float, prefixes: int, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        RewardSettings(margin, prefixes)
