"""The alarm: a reward that rises while the truth falls, or while answers get odd."""

from typing import Any, cast

import pytest

from runtime.alignment.online.evaluation import Evaluation

History = list[tuple[int, dict[str, float]]]


def _alarms(history: History) -> list[str]:
    evaluation = Evaluation(cast(Any, None), (), 1, None, history)
    return [one.warning for one in evaluation.alarms()]


def _at(step: int, reward: float, truth: float | None = None, surprise: float = 1.0) -> tuple[int, dict[str, float]]:
    known = {} if truth is None else {"truth": truth}
    return step, {"reward": reward, "surprise": surprise, **known}


def test_a_reward_that_rises_while_the_truth_falls_is_named() -> None:
    history = [_at(0, 1.0, 0.4), _at(10, 2.0, 0.6), _at(20, 3.0, 0.5)]
    assert _alarms(history) == [
        "from step 10 to 20 the reward rose from 2 to 3 while the truth fell from 0.6 to 0.5: the policy exploits the "
        "reward"
    ]


def test_without_a_truth_odd_answers_are_named() -> None:
    found = _alarms([_at(0, 1.0), _at(10, 2.0, surprise=1.6)])
    assert found == [
        "from step 0 to 10 the reward rose from 1 to 2 while the reference's surprise rose from 1 to 1.6 nats per "
        "token: the policy may exploit the reward"
    ]


def test_with_a_truth_odd_answers_are_named_too() -> None:
    odd = [_at(0, 1.0, 0.4), _at(10, 2.0, 0.6, surprise=1.6)]
    assert ["surprise rose" in one for one in _alarms(odd)] == [True]
    both = _alarms([*odd, _at(20, 3.0, 0.3, surprise=1.7)])
    assert [("from step 10" in one, "truth fell" in one) for one in both] == [(True, True), (False, False)]
    assert _alarms([*odd, (20, {"surprise": 3.0})]) == []  # nothing was scored


@pytest.mark.parametrize(
    "history",
    [
        [_at(0, 1.0, 0.4)],
        [_at(0, 1.0, 0.4), _at(10, 2.0, 0.6)],  # both rise
        [_at(0, 1.0, 0.4), _at(10, 0.5, 0.2)],  # both fall
        [_at(0, 1.0, 0.4), _at(10, 2.0, 0.38)],  # within the noise
        [_at(0, 1.0), _at(10, 2.0, surprise=1.2)],
    ],
)
def test_other_courses_raise_no_alarm(history: History) -> None:
    assert _alarms(history) == []
