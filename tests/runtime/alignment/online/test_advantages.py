"""Advantages against plain Python in float64."""

import math
import random

import pytest
import torch
from torch import Tensor

from runtime.alignment.online.advantages import (
    generalised_advantages,
    group_advantages,
    has_spread,
    jbond_rewards,
    leave_one_out,
    quantile_rewards,
    remax_returns,
    token_rewards,
    whitened,
)

Numbers = list[list[float]]
TOLERANCE = 1e-12


def _random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _mask(lengths: list[tuple[int, int]], width: int) -> Tensor:
    """Rows whose answers begin at and end before given places."""
    return torch.tensor([[start <= place < end for place in range(width)] for start, end in lengths])


def _kept(row: list[float], is_scored: list[bool]) -> list[float]:
    return [value for value, known in zip(row, is_scored, strict=True) if known]


@pytest.mark.parametrize("is_scaled", [True, False])
def test_group_advantages_are_rewards_less_their_prompts_mean(is_scaled: bool) -> None:
    rewards, is_scored = _random(5, 6), torch.rand(5, 6, generator=torch.Generator().manual_seed(1)) < 0.7
    is_scored[0] = True
    found = group_advantages(rewards, is_scored, is_scaled).tolist()
    for row, known, values in zip(rewards.tolist(), is_scored.tolist(), found, strict=True):
        kept = _kept(row, known)
        mean = math.fsum(kept) / max(len(kept), 1)
        variance = math.fsum((value - mean) ** 2 for value in kept) / max(len(kept) - 1, 1)
        scale = math.sqrt(variance) + 1e-4 if is_scaled else 1.0
        expected = [(value - mean) / scale if scored else 0.0 for value, scored in zip(row, known, strict=True)]
        assert values == pytest.approx(expected, abs=TOLERANCE)


def test_equal_rewards_teach_nothing() -> None:
    rewards, is_scored = torch.full((2, 4), 0.7), torch.ones(2, 4, dtype=torch.bool)
    rewards[1, 2] = 0.8
    assert has_spread(rewards, is_scored).tolist() == [False, True]
    assert group_advantages(rewards, is_scored)[0].tolist() == [0.0] * 4
    is_scored[1, 2] = False
    assert has_spread(rewards, is_scored).tolist() == [False, False]


def test_leave_one_out_compares_with_the_other_answers() -> None:
    rewards, is_scored = _random(4, 5), torch.ones(4, 5, dtype=torch.bool)
    is_scored[1, 3] = False
    is_scored[2, 1:] = False  # a single one has nothing to be compared with
    found = leave_one_out(rewards, is_scored)
    for row in range(4):
        for column in range(5):
            others = [float(rewards[row, i]) for i in range(5) if i != column and is_scored[row, i]]
            own = bool(is_scored[row, column]) and others
            expected = float(rewards[row, column]) - math.fsum(others) / len(others) if own else 0.0
            assert float(found[row, column]) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_generalised_advantages_are_discounted_surprises(gamma: float, lam: float) -> None:
    rewards, values = _random(3, 7), _random(3, 7, 1)
    spans = [(2, 7), (0, 4), (3, 3)]
    advantages, returns = generalised_advantages(rewards, values, _mask(spans, 7), gamma, lam)
    for row, (start, end) in enumerate(spans):
        own, ahead = rewards[row].tolist(), values[row].tolist()
        surprises = {
            place: own[place] + (gamma * ahead[place + 1] if place + 1 < end else 0.0) - ahead[place]
            for place in range(start, end)
        }
        for place in range(7):
            inside = start <= place < end
            expected = sum((gamma * lam) ** (t - place) * surprises[t] for t in range(place, end)) if inside else 0.0
            assert float(advantages[row, place]) == pytest.approx(expected, abs=TOLERANCE)
            assert float(returns[row, place]) == pytest.approx(expected + ahead[place] if inside else 0.0)


def test_whitened_tokens_have_mean_zero_and_variance_one() -> None:
    values, mask = _random(4, 6), _mask([(0, 6), (2, 3), (1, 5), (6, 6)], 6)
    found = whitened(values, mask)
    assert float(found[mask].mean()) == pytest.approx(0, abs=1e-9)
    assert float(found[mask].var()) == pytest.approx(1, abs=1e-6)
    assert not found[~mask].any()


def test_the_score_is_paid_at_the_last_token_and_the_divergence_at_each() -> None:
    kl, mask = _random(2, 4), _mask([(1, 3), (0, 4)], 4)
    found = token_rewards(torch.tensor([5.0, -2.0], dtype=torch.float64), kl, mask, 0.1).tolist()
    k = kl.tolist()
    assert found[0] == pytest.approx([0.0, -0.1 * k[0][1], -0.1 * k[0][2] + 5.0, 0.0])
    assert found[1] == pytest.approx([*(-0.1 * one for one in k[1][:3]), -0.1 * k[1][3] - 2.0])


def test_remax_subtracts_the_greedy_answers_reward_before_it_clips() -> None:
    kl, mask = _random(3, 5), _mask([(0, 5), (2, 4), (1, 2)], 5)
    scores, greedy = torch.tensor([9.0, 1.0, 0.0]).double(), torch.tensor([1.0, 0.5, 9.0]).double()
    found = remax_returns(scores, greedy, kl, mask, 0.05, 0.9)
    gains = [5.0, 0.5, -5.0]
    for row, (start, end) in enumerate([(0, 5), (2, 4), (1, 2)]):
        for place in range(5):
            inside = start <= place < end
            expected = -0.05 * float(kl[row, place]) + gains[row] * 0.9 ** (end - place) if inside else 0.0
            assert float(found[row, place]) == pytest.approx(expected, abs=TOLERANCE)


def test_jbond_punishes_what_is_below_both_of_the_anchors_answers() -> None:
    anchors = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0, 1.0]])
    found = jbond_rewards(torch.tensor([0.5, 1.0, 1.5, 1.0]), anchors).tolist()
    assert found == pytest.approx([-math.log(16), 0.0, 0.0, 0.0])


def test_the_jbond_reward_is_the_log_quantile_on_average_at_the_median() -> None:
    rng = random.Random(0)
    drawn = torch.tensor([[rng.random(), rng.random()] for _ in range(40_000)])
    found = jbond_rewards(torch.full((40_000,), 0.5), drawn).mean()
    assert float(found) == pytest.approx(math.log(0.5), abs=0.02)


def test_quantiles_count_the_references_answers_that_are_no_better() -> None:
    references = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).expand(4, -1)
    found = quantile_rewards(torch.tensor([0.0, 1.0, 2.5, 9.0]), references).exp().tolist()
    assert found == pytest.approx([0.125, 0.25, 0.5, 1.0])
