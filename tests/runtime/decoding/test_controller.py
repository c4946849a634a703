"""The controller drafts as many tokens as pay, by the times of real rounds, which are given here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest

from runtime.decoding.controller import ENOUGH, TRY_AGAIN, Acceptance, Controller

Seconds = Callable[[int, int], float]  # rows, drafted tokens -> seconds of a round


def linear(fixed: float, per_token: float, kept: float = 0.5) -> Seconds:
    """A verify pass, and a draft pass of some of the layers."""

    def seconds(rows: int, k: int) -> float:
        one = fixed + per_token * rows * (k + 1)
        return one * (1 + kept) if k else one

    return seconds


@dataclass
class Rows:
    """Rows that are decoded as the controller says: what was drafted, and how long it took."""

    controller: Controller
    seconds: Seconds
    rate: float  # chance of each draft
    spent: float = 0.0
    tokens: float = 0.0  # per row

    def go(self, n_rounds: int, rows: int = 1, room: int = 50, slots: int = 64) -> list[int]:
        """Drafted tokens, round by round."""
        return [self._round([room] * rows, slots) for _ in range(n_rounds)]

    def _round(self, rooms: Sequence[int], slots: int) -> int:
        k = self.controller.choose(rooms, slots)
        took = self.seconds(len(rooms), k)
        if k:
            chances = [self.rate**place for place in range(k + 1)] + [0.0] * (self.controller.k - k)
            reached = [len(rooms) * one * (place < k) for place, one in enumerate(chances[:-1])]
            self.controller.acceptance.observe(reached, [len(rooms) * one for one in chances[1:]])
        self.controller.observe(len(rooms), slots, k, took)
        self.spent += took
        self.tokens += sum(self.rate**place for place in range(k + 1))
        return k


def test_acceptance_is_learnt_by_place() -> None:
    acceptance = Acceptance(3)
    for _ in range(600):
        acceptance.observe([10, 8, 4], [8, 4, 0])
    assert acceptance.rates == pytest.approx([0.8, 0.5, 0.0], abs=0.01)
    assert acceptance.tokens() == pytest.approx([1, 1.8, 2.2, 2.2], abs=0.02)


def test_rounds_without_drafts_make_old_drafts_count_less() -> None:
    acceptance = Acceptance(1)
    for _ in range(1000):
        acceptance.observe([10], [1])
    for _ in range(100_000):
        acceptance.fade()
    assert acceptance.rates == pytest.approx([0.1], rel=1e-3)
    acceptance.observe([10], [10])
    assert acceptance.rates[0] > 0.7


def test_what_was_measured_before_is_where_it_begins() -> None:
    assert Controller(2, (0.9, 0.3, 0.1)).acceptance.tokens() == pytest.approx([1, 1.9, 2.17])
    assert Controller(4, (0.99,) * 4).choose([50], 64) == 4
    assert set(Rows(Controller(4, (0.01,) * 4), linear(1.0, 0.01), 0.01).go(1 + ENOUGH)) <= {0, 1}


@pytest.mark.parametrize(("rows", "expected"), [(1, 4), (1000, 0)])
def test_cheap_tokens_are_drafted_and_dear_ones_are_not(rows: int, expected: int) -> None:
    chosen = Rows(Controller(4), linear(1.0, 0.01), 0.8).go(100, rows)
    assert set(chosen[30:]) == {expected}


def test_the_best_number_has_most_tokens_per_second() -> None:
    seconds = linear(1.0, 0.08)
    chosen = Rows(Controller(6), seconds, 0.6).go(100)
    rates = [sum(0.6**place for place in range(k + 1)) / seconds(1, k) for k in range(7)]
    best = max(range(7), key=rates.__getitem__)
    assert 0 < best < 6
    assert chosen[-1] == best


@pytest.mark.parametrize("rows", [1, 8])
def test_what_is_never_accepted_is_drafted_seldom_but_again_and_again(rows: int) -> None:
    decoded = Rows(Controller(4), linear(1.0, 0.01), 0.05)
    decoded.go(20 * TRY_AGAIN, rows)
    for _ in range(5):
        assert 1 <= sum(k > 0 for k in decoded.go(10 * TRY_AGAIN, rows)) <= 10


@pytest.mark.parametrize("rows", [1, 8])
def test_drafting_returns_when_its_drafts_are_accepted_again(rows: int) -> None:
    decoded = Rows(Controller(4), linear(1.0, 0.01), 0.8)
    assert decoded.go(100, rows)[-1] == 4
    decoded.rate = 0.0
    assert decoded.go(1000, rows)[-100:].count(0) >= 99
    decoded.rate = 0.8
    assert decoded.go(8 * TRY_AGAIN, rows)[-1] == 4


def test_drafting_stops_at_a_loss_and_starts_at_a_clear_gain_only() -> None:
    times = {0: 1.0, 1: 1.7}
    decoded = Rows(Controller(1), lambda rows, k: times[k], 0.84)
    assert decoded.go(1000, 8)[-1] == 1  # 1.84 tokens for 1.70
    decoded.rate = 0.7
    assert decoded.go(1000, 8)[-1] == 0
    decoded.rate = 0.82
    assert decoded.go(8 * TRY_AGAIN, 8)[-1] == 0  # a gain of 7 % is within noise
    decoded.rate = 0.97
    assert decoded.go(8 * TRY_AGAIN, 8)[-1] == 1


def test_plain_rounds_are_timed_again_while_drafting_pays() -> None:
    chosen = Rows(Controller(4), linear(1.0, 0.01), 0.8).go(6 * TRY_AGAIN)
    assert 4 <= chosen[20:].count(0) <= 6


@pytest.mark.parametrize("rows", [[64], [16], [1], [64, 32, 16, 8, 4, 2, 1]])
def test_learning_a_machine_costs_next_to_nothing(rows: list[int]) -> None:
    """From the first round on, against plain decoding, where drafts lose and where they gain."""
    seconds = linear(4.0, 0.08, 0.33)
    decoded = Rows(Controller(4, (0.9, 0.7, 0.8, 0.45)), seconds, 0.75)
    plain = 0.0
    for n in rows:
        before = decoded.tokens
        decoded.go(100 // len(rows), n)
        plain += (decoded.tokens - before) * seconds(n, 0)
    assert decoded.spent < 1.02 * plain


def test_a_size_like_one_that_is_known_needs_no_trials() -> None:
    seconds = linear(1.0, 0.01)
    decoded = Rows(Controller(4), seconds, 0.8)
    decoded.go(50, 2)
    assert set(decoded.go(50, 1)) == {4}
    decoded.go(100, 1000)
    assert set(decoded.go(50, 4000)) == {0}


def test_rows_that_wait_or_nearly_do_shorten_the_draft() -> None:
    decoded = Rows(Controller(4), linear(1.0, 0.05), 0.9)
    assert decoded.go(50, 4)[-1] == 4
    assert decoded.controller.choose([2, 1, 0, 2], 64) <= 1
    assert decoded.controller.choose([1, 1, 0, 1], 64) == 0
    short = Rows(Controller(4), linear(1.0, 1.0), 0.5).go(100, 4, room=2)
    assert short[-50:].count(0) >= 49


def test_time_between_rounds_favours_drafts() -> None:
    assert Rows(Controller(2), linear(1.0, 0.1, kept=0.9), 0.5).go(50, 3)[-1] == 0
    controller = Controller(2)
    controller.gaps.extend([5.0] * 9)
    assert Rows(controller, linear(1.0, 0.1, kept=0.9), 0.5).go(50, 3)[-1] == 2


def _slower(seconds: Seconds, slowness: float, rows: int, k: int) -> float:
    return slowness * seconds(rows, k)


@pytest.mark.parametrize("pays", [True, False])
def test_a_machine_that_becomes_slower_for_all_rounds_alike_changes_nothing(pays: bool) -> None:
    """Old times of the one kind against new ones of the other would say that drafting pays, or no longer does."""
    seconds = linear(1.0, 0.01) if pays else linear(1.0, 1.0)
    decoded = Rows(Controller(4), seconds, 0.8)
    decoded.go(200, 2)
    for slowness in (1.6, 0.7, 2.0, 1.0):
        decoded.seconds = partial(_slower, seconds, slowness)
        chosen = decoded.go(40, 2)
        assert sum((k > 0) != pays for k in chosen) <= 3


def test_a_slow_moment_at_the_start_is_forgotten() -> None:
    seconds, slow = linear(1.0, 0.01), [True]
    decoded = Rows(Controller(4), lambda rows, k: seconds(rows, k) * (4 if k and slow[0] else 1), 0.8)
    decoded.go(8)
    slow[0] = False
    assert decoded.go(10 * TRY_AGAIN)[-1] == 4
