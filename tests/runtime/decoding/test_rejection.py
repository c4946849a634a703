"""The cut rule alone, without a model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.decoding.rejection import CutSchedule, PromptCuts, keep_count
from runtime.errors import ConfigError


def cuts_for(schedule: CutSchedule, n: int) -> PromptCuts:
    return PromptCuts(schedule, set(range(n)))


def test_fraction_is_rounded_up_and_never_zero() -> None:
    assert [keep_count(n, 0.5) for n in (1, 2, 3, 4)] == [1, 1, 2, 2]
    assert [keep_count(n, 0.1) for n in (1, 5, 10, 11, 30)] == [1, 1, 1, 2, 3]
    assert keep_count(7, 1.0) == 7


@given(
    scores=st.lists(st.floats(-5, 5), min_size=1, max_size=12),
    keep=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4),
    contrast=st.integers(0, 3),
)
def test_best_candidate_survives_any_schedule(scores: list[float], keep: list[float], contrast: int) -> None:
    schedule = CutSchedule(tuple(range(1, len(keep) + 1)), tuple(keep), contrast)
    state = cuts_for(schedule, len(scores))
    best = min(range(len(scores)), key=lambda index: (-scores[index], index))
    running = dict(enumerate(scores))
    while state.next_tokens is not None:
        dropped = state.cut({index: running[index] for index in state.competing})
        assert best in state.competing and best not in dropped
        assert not set(dropped) & (state.competing | state.exempt)
    assert len(state.exempt) <= contrast


def test_ties_go_to_the_lower_index() -> None:
    state = cuts_for(CutSchedule((4,), (0.5,)), 4)
    assert state.cut({0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}) == [2, 3]


def test_finished_candidates_compete_and_stay_complete() -> None:
    state = cuts_for(CutSchedule((4, 8), (0.5, 0.5)), 4)
    state.final_scores = {0: 9.0, 1: -9.0}
    assert state.cut({2: 1.0, 3: 0.0}) == [3]
    assert state.competing == {0, 2}
    assert state.cut({2: 1.0}) == [2]
    assert state.competing == {0}
    assert 0 not in state.records and 1 not in state.records


def test_contrast_exempts_the_lowest_of_the_first_cut_only() -> None:
    state = cuts_for(CutSchedule((4, 8), (0.5, 0.5), contrast=1), 6)
    assert state.cut(dict(enumerate([5.0, 4.0, 3.0, 2.0, 1.0, 0.0]))) == [3, 4]
    assert state.exempt == {5}
    assert state.records[5][0].kept and not state.records[4][0].kept
    assert state.cut({0: 5.0, 1: 4.0, 2: 3.0}) == [2]


def test_keeping_all_leaves_no_contrast() -> None:
    state = cuts_for(CutSchedule((4,), (1.0,), contrast=2), 3)
    assert state.cut({0: 1.0, 1: 2.0, 2: 3.0}) == []
    assert state.exempt == set()


@pytest.mark.parametrize(
    ("tokens", "keep", "contrast"),
    [
        ((8,), (), 0),
        ((8, 8), (0.5, 0.5), 0),
        ((0,), (0.5,), 0),
        ((8,), (0.0,), 0),
        ((8,), (1.5,), 0),
        ((8,), (0.5,), -1),
    ],
)
def test_impossible_schedules_are_refused(tokens: tuple[int, ...], keep: tuple[float, ...], contrast: int) -> None:
    with pytest.raises(ConfigError):
        CutSchedule(tokens, keep, contrast)
