"""Many judgements of one pair to what the group prefers. Ties count as votes: they are for neither answer."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Count:
    """Votes for the first answer, for the second, and for neither."""

    first: int
    second: int
    tie: int

    @property
    def n_votes(self) -> int:
        """All of them."""
        return self.first + self.second + self.tie

    def agreement(self, answer: int) -> float:
        """The share of all votes that is for an answer (0 or 1)."""
        return (self.first, self.second)[answer] / self.n_votes

    def __str__(self) -> str:
        return f"{self.first} for one answer, {self.second} for the other, {self.tie} for neither"


def count_votes(choices: Sequence[int | None]) -> Count:
    """Choices are 0, 1, or None for a tie."""
    return Count(choices.count(0), choices.count(1), choices.count(None))


def winner(count: Count, min_agreement: float) -> int | None:
    """The answer whose share of the votes is above `min_agreement` (0.5 or more); None when there is none."""
    return next((answer for answer in (0, 1) if count.agreement(answer) > min_agreement), None)
