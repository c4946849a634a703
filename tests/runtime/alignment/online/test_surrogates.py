"""Surrogates and their gradients against plain Python in float64."""

import math

import pytest
import torch
from torch import Tensor

from runtime.alignment.online.surrogates import (
    Clip,
    clipped_losses,
    clipped_value_losses,
    divisor_of,
    jbond_losses,
    k3,
    per_answer,
)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("clip", [Clip(), Clip(0.2, 0.28), Clip(0.05, 0.4)])
def test_the_clipped_surrogate_and_its_gradient(clip: Clip) -> None:
    old, advantages = _random(6, 5), _random(6, 5, seed=1)
    logps = (old + 0.3 * _random(6, 5, seed=2)).requires_grad_()
    losses, is_held = clipped_losses(logps, old, advantages, clip)
    losses.sum().backward()
    assert logps.grad is not None
    found = losses.detach()
    for row in range(6):
        for place in range(5):
            a = float(advantages[row, place])
            ratio = math.exp(float(logps.detach()[row, place]) - float(old[row, place]))
            held = min(max(ratio, 1 - clip.low), 1 + clip.high)
            expected = max(-ratio * a, -held * a)
            assert float(found[row, place]) == pytest.approx(expected, abs=1e-12)
            is_free = (ratio <= 1 + clip.high) if a > 0 else (ratio >= 1 - clip.low)
            assert bool(is_held[row, place]) == (not is_free)
            assert float(logps.grad[row, place]) == pytest.approx(-ratio * a if is_free else 0.0, abs=1e-12)


def test_at_the_first_update_the_gradient_is_reinforce_though_the_ratio_is_one() -> None:
    old, advantages = _random(2, 3), _random(2, 3, seed=1)
    logps = old.clone().requires_grad_()
    losses, is_held = clipped_losses(logps, old, advantages, Clip())
    losses.sum().backward()
    assert logps.grad is not None
    torch.testing.assert_close(logps.grad, -advantages)
    assert not is_held.any()


def test_values_are_held_near_the_old_ones() -> None:
    values, old, returns = _random(4, 3), _random(4, 3, seed=1), _random(4, 3, seed=2)
    found = clipped_value_losses(values, old, returns, 0.2)
    for v, o, r, loss in zip(*(t.flatten().tolist() for t in (values, old, returns, found)), strict=True):
        held = o + min(max(v - o, -0.2), 0.2)
        assert loss == pytest.approx(0.5 * max((v - r) ** 2, (held - r) ** 2), abs=1e-12)


def test_k3_and_its_gradient() -> None:
    logps, reference = _random(5, 4).requires_grad_(), _random(5, 4, seed=1)
    found = k3(logps, reference)
    found.sum().backward()
    assert logps.grad is not None
    for p, q, value, slope in zip(*(t.flatten().tolist() for t in (logps, reference, found, logps.grad)), strict=True):
        assert value == pytest.approx(math.exp(q - p) - (q - p) - 1, abs=1e-12)
        assert slope == pytest.approx(1 - math.exp(q - p), abs=1e-12)
    assert bool((found >= 0).all())


def test_k3_is_the_divergence_on_average() -> None:
    policy, reference = torch.softmax(_random(6), -1), torch.softmax(_random(6, seed=1), -1)
    each = k3(policy.log(), reference.log())
    assert float((policy * each).sum()) == pytest.approx(float((policy * (policy / reference).log()).sum()), abs=1e-12)


def test_far_away_tokens_stay_finite() -> None:
    far = torch.tensor([[-2000.0]])
    assert bool(k3(far, torch.zeros(1, 1)).isfinite().all())
    assert bool(clipped_losses(-far, torch.zeros(1, 1), torch.ones(1, 1), Clip())[0].isfinite().all())


def test_answers_are_weighed_by_their_tokens_as_the_method_says() -> None:
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    mean = {how: float(per_answer(losses, mask, divisor_of(how, mask, 10)).mean()) for how in HOWS}
    assert mean == pytest.approx({"sequence": 3.0, "token": 2.5, "constant": 0.5})


HOWS = ("sequence", "token", "constant")


@pytest.mark.parametrize("how", HOWS)
def test_splitting_an_update_into_passes_changes_nothing(how: str) -> None:
    losses, mask = _random(6, 5), torch.arange(5) < torch.tensor([5, 1, 3, 2, 5, 4])[:, None]
    divisor = divisor_of(how, mask, 8)  # type: ignore[arg-type]
    whole = per_answer(losses, mask, divisor).mean()
    parts = sum(per_answer(losses[at : at + 2], mask[at : at + 2], divisor).sum() for at in (0, 2, 4)) / 6
    torch.testing.assert_close(torch.as_tensor(parts), whole)


@pytest.mark.parametrize(("beta", "gamma"), [(0.5, 0.0), (0.3, 2.0), (0.0, 0.0), (1.0, 1.0)])
def test_the_gradient_of_jbond_is_that_of_its_update(beta: float, gamma: float) -> None:
    best, policy = _random(4).requires_grad_(), _random(4, seed=1).requires_grad_()
    anchor, advantages = _random(4, seed=2), _random(4, seed=3)
    jbond_losses(best, policy, anchor, advantages, (beta, gamma)).sum().backward()
    assert best.grad is not None and policy.grad is not None
    torch.testing.assert_close(best.grad, torch.full_like(best, -(1 - beta)))
    expected = -beta * advantages + gamma * (policy - anchor).detach()  # descending it lowers the divergence
    torch.testing.assert_close(policy.grad, expected)


def test_the_regulariser_lowers_the_divergence_from_the_anchor() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    anchor = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()

    def divergence() -> float:
        law = logits.detach().log_softmax(-1)
        return float((law.exp() * (law - anchor)).sum())

    before = divergence()
    for _ in range(50):
        law = logits.log_softmax(-1)
        zero = torch.zeros_like(law)
        each = jbond_losses(zero, law, anchor, zero, (0.0, 1.0))  # of every answer there is
        (law.exp().detach() * each).sum().backward()
        with torch.no_grad():
            assert logits.grad is not None
            logits -= 0.5 * logits.grad
            logits.grad = None
    assert divergence() < 0.05 * before
