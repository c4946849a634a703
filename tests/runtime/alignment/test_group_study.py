"""The group-robust reducer on the synthetic study of its authors, on three seeds (tests/benchmarks has all twenty)."""

from typing import Literal

import pytest
import torch

from tests.benchmarks.group_study import N_TRAIN, Data, Pairs, train

SEEDS = (2021, 2022, 2023)
STEPS = {"dpo": 400, "ipo": 40}


@pytest.mark.parametrize("method", ["dpo", "ipo"])
@pytest.mark.parametrize("data", ["uneven and imbalanced", "uneven", "imbalanced"])
def test_robust_beats_importance_beats_mean_on_the_worst_group(data: Data, method: Literal["dpo", "ipo"]) -> None:
    plain, even, robust = (
        train(SEEDS, data, method, reducer, STEPS[method]).worst.mean() for reducer in ("mean", "importance", "robust")
    )
    assert robust < even
    if data == "uneven":  # as many pairs of either group, so every group alike is every pair alike
        assert torch.isclose(even, plain, rtol=1e-9)
    else:
        assert even < plain


def test_what_helps_the_worst_group_costs_the_others() -> None:
    even, robust = (train(SEEDS, "uneven", "ipo", reducer, 40) for reducer in ("importance", "robust"))
    assert robust.mean.mean() > even.mean.mean()
    assert robust.hard_weight.mean() > 0.7
    assert robust.reward_error.mean() < even.reward_error.mean()


def test_a_seed_is_trained_alike_alone_and_among_others() -> None:
    alone = train(SEEDS[1:2], "uneven and imbalanced", "dpo", "robust", 20)
    among = train(SEEDS, "uneven and imbalanced", "dpo", "robust", 20)
    assert torch.allclose(alone.worst, among.worst[1:2], rtol=1e-9)


def test_the_data_are_as_described() -> None:
    uneven = Pairs.drawn(SEEDS, "uneven and imbalanced", N_TRAIN, 0.2)
    distance = (uneven.chosen - uneven.rejected).abs()
    assert (uneven.groups == 0).sum(dim=1).tolist() == [60] * 3
    assert distance[uneven.groups == 0].eq(1).all() and distance[uneven.groups == 1].eq(4).all()
    rewards = [uneven.rewards.gather(-1, each[..., None]) for each in (uneven.chosen, uneven.rejected)]
    assert (rewards[0] > rewards[1]).all()
