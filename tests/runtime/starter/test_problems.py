import random

from hypothesis import given
from hypothesis import strategies as st

from runtime.records import Message, Prompt
from runtime.starter.problems import (
    GROUP_SHARES,
    GROUPS,
    MAX_TOTAL,
    draw_problem,
    draw_question,
    draw_totals,
    write_answer,
)
from runtime.starter.rule import final_number, style_of, truth

seeds = st.integers(0, 2**32)


@given(seeds)
def test_every_running_total_of_a_problem_stays_in_range(seed: int) -> None:
    problem = draw_problem(random.Random(seed))
    assert all(1 <= total <= MAX_TOTAL for total in problem.totals)
    assert problem.answer == problem.start + sum(problem.steps)


@given(seeds, st.sampled_from(GROUPS), st.floats(0, 1))
def test_every_written_answer_is_recognised_in_its_style_and_number(seed: int, style: str, slips: float) -> None:
    rng = random.Random(seed)
    problem = draw_problem(rng)
    totals = draw_totals(problem, slips, rng)
    answer = write_answer(problem, style, totals)
    assert style_of(answer) == style
    assert final_number(answer) == totals[-1]


@given(seeds)
def test_truth_needs_the_right_number_and_the_groups_style(seed: int) -> None:
    question = draw_question(random.Random(seed), held_out=True)
    prompt = Prompt("p", (Message("user", question.text),), question.group, str(question.problem.answer))
    right = question.problem.totals
    slipped = (*right[:-1], right[-1] + 1)
    for style in GROUPS:
        assert truth(prompt, write_answer(question.problem, style, right)) == float(style == question.group)
        assert truth(prompt, write_answer(question.problem, style, slipped)) == 0.0


def test_a_truncated_answer_is_never_true() -> None:
    question = draw_question(random.Random(3), held_out=True)
    prompt = Prompt("p", (Message("user", question.text),), question.group, str(question.problem.answer))
    answer = write_answer(question.problem, question.group, question.problem.totals)
    assert truth(prompt, answer) == 1.0
    assert all(truth(prompt, answer[:cut]) == 0.0 for cut in range(len(answer)))


def test_no_slips_gives_the_right_totals_and_slips_are_carried_on() -> None:
    problem = draw_problem(random.Random(0))
    assert draw_totals(problem, 0.0, random.Random(0)) == problem.totals
    slipped = draw_totals(problem, 1.0, random.Random(0))
    assert slipped[0] != problem.totals[0]


def test_held_out_questions_never_appear_among_training_questions() -> None:
    rng = random.Random(1)
    training = {draw_question(rng, held_out=False).problem for _ in range(300)}
    held_out = {draw_question(rng, held_out=True).problem for _ in range(100)}
    assert not training & held_out


def test_group_shares_are_uneven_as_stated() -> None:
    rng = random.Random(2)
    drawn = [draw_question(rng, held_out=False).group for _ in range(2000)]
    for group, share in GROUP_SHARES.items():
        assert abs(drawn.count(group) / len(drawn) - share) < 0.04
