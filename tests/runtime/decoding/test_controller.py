"""The controller drafts as many tokens as pay, by times that are given here."""

from collections.abc import Callable

import pytest

from runtime.decoding.controller import TRY_AGAIN, Acceptance, Controller


def linear(fixed: float, per_token: float, rows: int, kept: float = 0.5) -> Callable[[int], float]:
    """Seconds of a round by drafted tokens: a verify pass, and a draft pass of some of the layers."""

    def seconds(k: int) -> float:
        one = fixed + per_token * rows * (k + 1)
        return one * (1 + kept) if k else one

    return seconds


def settled(controller: Controller, rate: float, rows: int = 1) -> Controller:
    """After many rounds in which each draft stays with this chance."""
    for _ in range(1000):
        reached = [rows * rate**place for place in range(controller.k)]
        controller.acceptance.observe(reached, [rate * one for one in reached])
    return controller


def test_acceptance_is_learnt_by_place() -> None:
    acceptance = Acceptance(3)
    for _ in range(600):
        acceptance.observe([10, 8, 4], [8, 4, 0])
    assert acceptance.rates == pytest.approx([0.8, 0.5, 0.0], abs=0.01)
    assert acceptance.tokens() == pytest.approx([1, 1.8, 2.2, 2.2], abs=0.02)


def test_what_was_measured_before_is_where_it_begins() -> None:
    assert Controller(2, (0.9, 0.3, 0.1)).acceptance.tokens() == pytest.approx([1, 1.9, 2.17])
    assert Controller(4, (0.99,) * 4).choose([50], 64, linear(1.0, 0.01, 1)) == 4
    assert Controller(4, (0.1,) * 4).choose([50], 64, linear(1.0, 0.01, 1)) == 0


def test_cheap_tokens_are_drafted_and_dear_ones_are_not() -> None:
    for rows, expected in ((1, 4), (1000, 0)):
        controller = settled(Controller(4), 0.8)
        assert controller.choose([50] * rows, 64, linear(1.0, 0.01, rows)) == expected


def test_the_best_number_has_most_tokens_per_second() -> None:
    seconds = linear(1.0, 0.08, 1)
    controller = settled(Controller(6), 0.6)
    rates = [expected / seconds(k) for k, expected in enumerate(controller.acceptance.tokens())]
    assert controller.choose([50], 64, seconds) == max(range(7), key=rates.__getitem__)
    assert 0 < controller.choose([50], 64, seconds) < 6


def test_what_is_never_accepted_is_drafted_seldom() -> None:
    controller = settled(Controller(4), 0.05)
    chosen = [controller.choose([50], 64, linear(1.0, 0.01, 1)) for _ in range(10 * TRY_AGAIN)]
    assert sum(k > 0 for k in chosen) <= 10


def test_drafting_stops_at_a_loss_and_starts_at_a_clear_gain_only() -> None:
    times = {0: 1.0, 1: 1.7}
    controller = settled(Controller(1), 0.84)
    assert controller.choose([50], 64, times.__getitem__) == 1  # 1.84 tokens for 1.70
    settled(controller, 0.7)
    assert controller.choose([50], 64, times.__getitem__) == 0
    settled(controller, 0.82)
    assert controller.choose([50], 64, times.__getitem__) == 0  # a gain of 7 % is within noise
    settled(controller, 0.97)
    assert controller.choose([50], 64, times.__getitem__) == 1


def test_each_size_of_the_batch_is_measured_once() -> None:
    controller, asked = Controller(4), []

    def measure(k: int) -> float:
        asked.append(k)
        return 1.0

    controller.choose([50] * 16, 64, measure)
    n_first = len(asked)
    controller.choose([50] * 14, 70, measure)
    assert len(asked) == n_first and set(asked) == {0, 1, 3, 4}
    controller.choose([50] * 4, 64, measure)
    assert len(asked) == 2 * n_first


def test_rows_that_wait_or_nearly_do_shorten_the_draft() -> None:
    controller = settled(Controller(4), 0.9)
    seconds = linear(1.0, 0.05, 4)
    assert controller.choose([50] * 4, 64, seconds) == 4
    assert controller.choose([2, 1, 0, 2], 64, seconds) <= 1
    assert controller.choose([1, 1, 0, 1], 64, seconds) == 0


def test_time_between_rounds_favours_drafts() -> None:
    controller = settled(Controller(2), 0.5)
    seconds = linear(1.0, 0.1, 3, kept=0.9)
    assert controller.choose([50] * 3, 64, seconds) == 0
    controller.gaps.extend([5.0] * 9)
    assert controller.choose([50] * 3, 64, seconds) == 2


def test_a_slow_moment_at_the_start_is_forgotten() -> None:
    controller, n_timed = settled(Controller(4), 0.8), 0

    def seconds(k: int) -> float:
        nonlocal n_timed
        n_timed += 1
        was_slow = k and n_timed <= 16
        return linear(1.0, 0.01, 1)(k) * (4 if was_slow else 1)

    chosen = [controller.choose([50], 64, seconds) for _ in range(34)]
    assert chosen[0] == 0
    assert chosen[-1] == 4
    assert n_timed == 16 + 4
