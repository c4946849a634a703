"""ReLU in place of SiLU, and the penalty that makes neurons rest."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime.alignment.config import OfflineConfig, RewardSettings
from runtime.alignment.losses import LossSettings
from runtime.alignment.report import TrainingReport
from runtime.alignment.sparsity import SparsitySettings, gated_layers, relufied, risen
from runtime.errors import ConfigError, ModelError
from runtime.models import LoadedModel, load_policy
from tests.runtime.alignment.trained import DPO, train
from tests.runtime.edge.models import gated_model

SFT = replace(DPO, loss=LossSettings("sft"), epochs=6)


def _curve(report: TrainingReport, metric: str) -> list[float]:
    return [
        point.value for point in report.points if (point.split, point.metric, point.group) == ("train", metric, None)
    ]


@pytest.fixture
def policy(tiny_policy_dir: Path) -> LoadedModel:
    return load_policy(str(tiny_policy_dir))


def test_a_relufied_model_learns_and_is_a_relu_model_when_it_is_loaded_again(
    policy: LoadedModel, tmp_path: Path
) -> None:
    report = train(policy, tmp_path, replace(SFT, sparsity=SparsitySettings(relufy=True)))
    loss = _curve(report, "loss")
    assert loss[-1] < 0.8 * loss[0]
    again = load_policy(str(tmp_path)).model
    assert again.config.hidden_act == "relu"
    assert all(isinstance(layer.act_fn, torch.nn.ReLU) for layer in gated_layers(again))
    assert 0.2 < _curve(report, "active")[0] < 0.8  # random gates: about half


def test_the_penalty_makes_fewer_neurons_active(tiny_policy_dir: Path, tmp_path: Path) -> None:
    found = {}
    for weight in (0.0, 10.0):
        sparsity = SparsitySettings(relufy=True, weight=weight)
        report = train(
            load_policy(str(tiny_policy_dir)), tmp_path / str(weight), replace(SFT, epochs=20, sparsity=sparsity)
        )
        found[weight] = (_curve(report, "active")[-1], _curve(report, "activation_l1")[-1])
    assert found[10.0][0] < 0.7 * found[0.0][0]
    assert found[10.0][1] < 0.5 * found[0.0][1]


def test_the_penalty_rises_from_nothing_to_its_whole_weight() -> None:
    values = [risen(step / 100) for step in range(101)]
    assert values[0] == 0
    assert values == sorted(values)
    assert values[75:] == [1.0] * 26


def test_figures_are_over_real_tokens_alone(policy: LoadedModel, tmp_path: Path) -> None:
    """Batches of one have no padding; the share of active neurons is the same with it."""
    still = replace(SFT, epochs=1, learning_rate=1e-6, sparsity=SparsitySettings(relufy=True))
    one, eight = (
        train(policy, tmp_path / str(size), replace(still, batch_size=size)).groups[""]["active"] for size in (1, 8)
    )
    assert one == pytest.approx(eight, abs=0.02)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DPO, "relufy = true: dpo compares with the model as it was; use method = sft first"),
        (replace(SFT, gradient_checkpointing=True), "do not work with gradient_checkpointing"),
    ],
)
def test_what_cannot_work_together_is_refused(config: OfflineConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(config, sparsity=SparsitySettings(relufy=True))


def test_a_reward_model_and_a_negative_weight_are_refused() -> None:
    with pytest.raises(ConfigError, match="is for policies"):
        replace(SFT, loss=RewardSettings(), sparsity=SparsitySettings(weight=1.0))
    with pytest.raises(ConfigError, match="sparsity_weight = -1 must be 0 or above"):
        SparsitySettings(weight=-1)


def test_models_without_silu_or_gates_are_refused() -> None:
    with pytest.raises(ModelError, match='hidden_act = "gelu" cannot be exchanged'):
        relufied(gated_model(activation="gelu"))
    with pytest.raises(ModelError, match="has no gated feed-forward layers"):
        gated_layers(torch.nn.Linear(2, 2))
