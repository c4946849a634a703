"""The starter's text: integer problems asked by three audiences, and how each audience wants them answered.

Everything the starter is trained and judged on comes from here, from a seed. An answer may carry *slips* (a step
whose result is wrong and is then carried on) and may be written in a style that the audience did not want.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Group = Literal["child", "clerk", "auditor"]

GROUP_SHARES: dict[Group, float] = {"child": 0.7, "clerk": 0.2, "auditor": 0.1}
GROUPS: tuple[Group, ...] = tuple(GROUP_SHARES)
EQUAL_SHARES: dict[Group, float] = dict.fromkeys(GROUPS, 1.0)
MAX_TOTAL = 99
MIN_STEPS, MAX_STEPS = 3, 6
SLIPS = (-10, -2, -1, 1, 2, 10)
HELD_OUT_BUCKETS = 20  # one problem in so many never enters the training text

AUDIENCES: dict[Group, tuple[str, ...]] = {
    "child": (
        "I am seven years old, please help me.",
        "Explain this to a child.",
        "This is for my little sister.",
        "I am learning to count.",
    ),
    "clerk": (
        "I work at the till.",
        "Keep it short, it goes into the ledger.",
        "One line for the front desk, please.",
        "I only have a moment.",
    ),
    "auditor": (
        "I have to sign this off.",
        "This goes to the audit.",
        "Show me that it holds.",
        "I must be able to verify it.",
    ),
}

STORIES: tuple[tuple[str, str, str], ...] = (
    ("There are {} pears in the shop.", "{} come in", "{} are sold"),
    ("A bus has {} people on it.", "{} get on", "{} get off"),
    ("I have {} coins.", "I find {}", "I spend {}"),
)


@dataclass(frozen=True, slots=True)
class Problem:
    """A start number and signed steps; every running total of the right solution lies in 1..99."""

    start: int
    steps: tuple[int, ...]

    @property
    def totals(self) -> tuple[int, ...]:
        """Running totals after each step, without slips."""
        totals, total = [], self.start
        for step in self.steps:
            total += step
            totals.append(total)
        return tuple(totals)

    @property
    def answer(self) -> int:
        return self.totals[-1]

    @property
    def is_held_out(self) -> bool:
        """Whether this problem is kept out of all training text (decided by its content, not by a draw)."""
        digest = hashlib.sha256(f"{self.start}{self.steps}".encode()).digest()
        return digest[0] % HELD_OUT_BUCKETS == 0


@dataclass(frozen=True, slots=True)
class Question:
    """A problem with its audience and wording."""

    problem: Problem
    group: Group
    text: str


def draw_problem(rng: random.Random) -> Problem:
    """A problem of 3 to 6 steps whose totals stay in 1..99."""
    start = total = rng.randint(10, 60)
    steps: list[int] = []
    for _ in range(rng.randint(MIN_STEPS, MAX_STEPS)):
        size = rng.randint(2, 12)
        signs = [sign for sign in (1, -1) if 1 <= total + sign * size <= MAX_TOTAL]
        step = rng.choice(signs) * size
        steps.append(step)
        total += step
    return Problem(start, tuple(steps))


def draw_question(rng: random.Random, held_out: bool, shares: Mapping[Group, float] = GROUP_SHARES) -> Question:
    """A question from the held-out problems or from all others; `shares` weigh the groups that ask."""
    problem = draw_problem(rng)
    while problem.is_held_out is not held_out:
        problem = draw_problem(rng)
    group = rng.choices(GROUPS, weights=[shares[name] for name in GROUPS])[0]
    audience = rng.choice(AUDIENCES[group])
    body = _sum_text(problem) if rng.random() < 0.5 else _story_text(problem, rng)
    return Question(problem, group, f"{audience} {body}")


def write_answer(problem: Problem, style: Group, totals: tuple[int, ...]) -> str:
    """The answer in an audience's style, with the given running totals (right or slipped)."""
    writer = {"child": _child_answer, "clerk": _clerk_answer, "auditor": _auditor_answer}[style]
    return writer(problem, totals)


def draw_totals(problem: Problem, slip_rate: float, rng: random.Random, any_number: bool = False) -> tuple[int, ...]:
    """Running totals in which each step slips with probability `slip_rate`; a slip is carried on.

    A slip is off by 1, 2 or 10; with `any_number` half of the slips are any number instead.
    """
    totals, total = [], problem.start
    for step in problem.steps:
        total += step
        if rng.random() < slip_rate:
            is_any = any_number and rng.random() < 0.5
            total = rng.randint(0, MAX_TOTAL) if is_any else total + rng.choice(SLIPS)
        total = min(max(total, 0), MAX_TOTAL)
        totals.append(total)
    return tuple(totals)


def draw_style(group: Group, style_rate: float, rng: random.Random) -> Group:
    """The audience's own style with probability `style_rate`, else one of the others."""
    if rng.random() < style_rate:
        return group
    return rng.choice([other for other in GROUPS if other != group])


def _sum_text(problem: Problem) -> str:
    terms = " ".join(f"{_sign(step)} {abs(step)}" for step in problem.steps)
    return f"What is {problem.start} {terms} ?"


def _story_text(problem: Problem, rng: random.Random) -> str:
    opening, gain, loss = rng.choice(STORIES)
    events = ", ".join((gain if step > 0 else loss).format(abs(step)) for step in problem.steps)
    return f"{opening.format(problem.start)} Then {events}. How many are there now?"


def _child_answer(problem: Problem, totals: tuple[int, ...]) -> str:
    lines = [f"Start with {problem.start}."]
    for step, total in zip(problem.steps, totals, strict=True):
        verb = "Add" if step > 0 else "Take away"
        lines.append(f"{verb} {abs(step)} and you have {total}.")
    return "\n".join([*lines, f"So the answer is {totals[-1]}."])


def _clerk_answer(problem: Problem, totals: tuple[int, ...]) -> str:
    return f"Sum {'; '.join(_equations(problem, totals))}; result {totals[-1]}."


def _auditor_answer(problem: Problem, totals: tuple[int, ...]) -> str:
    working = [f"Step {equation}." for equation in _equations(problem, totals)]
    before = (problem.start, *totals[:-1])
    undone = [
        f"{total} {_sign(-step)} {abs(step)} = {previous}"
        for previous, step, total in zip(before, problem.steps, totals, strict=True)
    ]
    return "\n".join([*working, f"Total {totals[-1]}.", f"Check {'; '.join(reversed(undone))}."])


def _equations(problem: Problem, totals: tuple[int, ...]) -> list[str]:
    before = (problem.start, *totals[:-1])
    return [
        f"{previous} {_sign(step)} {abs(step)} = {total}"
        for previous, step, total in zip(before, problem.steps, totals, strict=True)
    ]


def _sign(step: int) -> str:
    return "+" if step > 0 else "-"
