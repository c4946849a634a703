"""The cut rule alone, without a model."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.decoding.rejection import CutSchedule, MemoryCuts, PromptCuts, keep_count, rank
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
        dropped = state.cut(4, {index: running[index] for index in state.competing})
        assert best in state.competing and best not in dropped
        assert not set(dropped) & (state.competing | state.exempt)
    assert len(state.exempt) <= contrast


def test_ties_go_to_the_lower_index() -> None:
    state = cuts_for(CutSchedule((4,), (0.5,)), 4)
    assert state.cut(4, {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}) == [2, 3]


def test_finished_candidates_compete_and_stay_complete() -> None:
    state = cuts_for(CutSchedule((4, 8), (0.5, 0.5)), 4)
    state.final_scores = {0: 9.0, 1: -9.0}
    assert state.cut(4, {2: 1.0, 3: 0.0}) == [3]
    assert state.competing == {0, 2}
    assert state.cut(4, {2: 1.0}) == [2]
    assert state.competing == {0}
    assert 0 not in state.records and 1 not in state.records


def test_contrast_exempts_the_lowest_of_the_first_cut_only() -> None:
    state = cuts_for(CutSchedule((4, 8), (0.5, 0.5), contrast=1), 6)
    assert state.cut(4, dict(enumerate([5.0, 4.0, 3.0, 2.0, 1.0, 0.0]))) == [3, 4]
    assert state.exempt == {5}
    assert state.records[5][0].kept and not state.records[4][0].kept
    assert state.cut(4, {0: 5.0, 1: 4.0, 2: 3.0}) == [2]


def test_keeping_all_leaves_no_contrast() -> None:
    state = cuts_for(CutSchedule((4,), (1.0,), contrast=2), 3)
    assert state.cut(4, {0: 1.0, 1: 2.0, 2: 3.0}) == []
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


@pytest.mark.parametrize(("target", "tokens"), [(0.3, (10, 30)), (0.5, (20,)), (1.0, (5, 50)), (0.11, (10, 20, 40))])
def test_a_schedule_for_a_target_costs_that_much(target: float, tokens: tuple[int, ...]) -> None:
    schedule = CutSchedule.for_compute(tokens, target, n_answer=100, contrast=1)
    cost, share = 0.0, 1.0
    for start, end, keep in zip([0, *tokens], [*tokens, 100], [*schedule.keep, 0.0], strict=True):
        cost += (end - start) * share
        share *= keep
    assert cost / 100 == pytest.approx(target, abs=1e-6)
    assert (schedule.tokens, schedule.contrast) == (tokens, 1)


@pytest.mark.parametrize(("target", "tokens"), [(0.1, (10,)), (1.2, (10,)), (0.5, ()), (0.9, (100,))])
def test_targets_out_of_reach_are_refused(target: float, tokens: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"cut target {target} cannot be reached")):
        CutSchedule.for_compute(tokens, target, n_answer=100)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=20), st.floats(0, 0.99))
def test_memory_cuts_keep_the_best_and_drop_someone(scores: list[float], alpha: float) -> None:
    running = dict(enumerate(scores))
    kept = MemoryCuts(alpha).kept(0, running, {})
    assert rank(running)[0] in kept
    assert len(kept) < len(scores) or alpha == 0 or len(scores) == 1


@pytest.mark.parametrize("alpha", [-0.1, 1.0])
def test_impossible_alphas_are_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"alpha = {alpha}")):
        MemoryCuts(alpha)
