"""Calibration against answers whose partial scores are made to predict the final ones exactly, or not at all."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.decoding.calibration import Trace, measure, propose, replay
from runtime.errors import InputError

TOKENS = (8, 16, 32, 64)


def traces(noise: float, n_prompts: int = 20, n: int = 32, length: int = 80) -> list[list[Trace]]:
    """Final scores N(0, 1); a partial score is 3 + 2 * final score, plus noise."""
    rng = random.Random(1)
    finals = [[rng.gauss(0, 1) for _ in range(n)] for _ in range(n_prompts)]
    return [[Trace(length, y, {t: 3 + 2 * y + rng.gauss(0, noise) for t in TOKENS}) for y in ys] for ys in finals]


def test_exact_partial_scores_are_recognised() -> None:
    for point in measure(traces(noise=0.0), TOKENS):
        assert (point.pearson, point.kendall) == pytest.approx((1.0, 1.0))
        assert set(point.winner_survives.values()) == {1.0}
        assert point.fit is not None
        assert (point.fit.intercept, point.fit.slope) == pytest.approx((-1.5, 0.5))
        assert 0 < point.fit.residual < 1e-3


def test_noise_lowers_every_figure() -> None:
    exact, noisy = (measure(traces(noise), TOKENS)[0] for noise in (0.5, 4.0))
    assert exact.pearson > 0.9 > noisy.pearson > 0.2
    assert exact.kendall > noisy.kendall
    assert exact.winner_survives[0.1] > noisy.winner_survives[0.1]
    assert exact.fit is not None and noisy.fit is not None and exact.fit.residual < noisy.fit.residual
    # Regression of y on x = 2 y + noise: residual variance 1 - 4 / (4 + noise^2).
    assert noisy.fit.residual == pytest.approx((1 - 4 / 20) ** 0.5, rel=0.1)


def test_token_counts_where_nearly_nobody_runs_say_nothing() -> None:
    short = [[Trace(10, y, {8: y}) for y in (0.0, 1.0, 2.0, 3.0)], [Trace(10, 1.0, {8: 1.0})]]
    (point,) = measure(short, TOKENS)
    assert (point.n_tokens, point.n_prompts) == (8, 1)


def test_a_schedule_on_exact_scores_costs_next_to_nothing() -> None:
    found = propose(traces(noise=0.0), TOKENS, retained=0.999)
    assert (found.tokens, found.gain_retained) == ((8,), 1.0)
    assert found.token_share == pytest.approx((4 * 80 + 28 * 8) / (32 * 80))


def test_noise_makes_a_schedule_keep_more() -> None:
    shares = [propose(traces(noise), TOKENS, retained=0.98).token_share for noise in (0.0, 1.0, 3.0)]
    assert shares == sorted(shares) and shares[0] < shares[-1] <= 1


@settings(deadline=None, max_examples=40)
@given(keep=st.lists(st.floats(0.05, 1), min_size=0, max_size=4), noise=st.floats(0, 3))
def test_a_replay_never_gains_and_never_costs_more_than_best_of_n(keep: Sequence[float], noise: float) -> None:
    share, gain = replay(traces(noise, n_prompts=3), TOKENS[: len(keep)], keep)
    assert 0 < share <= 1
    assert gain <= 1 + 1e-12
    if all(fraction == 1 for fraction in keep):
        assert (share, gain) == pytest.approx((1, 1))


def test_nothing_to_measure_on_is_said() -> None:
    with pytest.raises(InputError, match="at least two finished"):
        propose([[Trace(5, 1.0, {})]], TOKENS)
