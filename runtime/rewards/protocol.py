"""What a reward is: a score for a finished answer, and sessions that score answers while they grow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.records import Prompt


@dataclass(frozen=True, slots=True)
class Score:
    """A finite number, or the reason why there is none."""

    value: float | None
    error: str | None = None

    @classmethod
    def of(cls, value: float) -> "Score":
        """NaN and infinities are errors, never numbers."""
        if math.isfinite(value):
            return cls(value)
        return cls(None, f"reward is {value}, not a finite number")


class RewardSession(Protocol):
    """Growing answers, one per row; rows keep their number."""

    def extend(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]], texts: Sequence[str]) -> None:
        """Add the policy's new tokens to `rows`; texts hold each whole answer so far."""
        ...

    def scores(self, rows: Sequence[int]) -> list[Score]:
        """Score the answers of `rows` as if they ended here."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Forget every row that is not in `rows`."""
        ...


class Reward(Protocol):
    """Anything that scores answers."""

    @property
    def name(self) -> str:
        """Short name, used as key of the score columns."""
        ...

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that a session keeps per token of prompts and answers; 0 for one that keeps texts only."""
        ...

    def start(self, prompts: Sequence[Prompt]) -> RewardSession:
        """A session for several answers to one prompt, one row per entry of `prompts`.

        Its answers are scored together; those that the first call of `scores` leaves out cannot be scored later.
        """
        ...

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Score]:
        """Scores of finished answers, from scratch; a failing row has an error and the others go on."""
        ...


class RescoringSession:
    """A session that scores the whole text again each time; correct for every reward."""

    def __init__(self, reward: Reward, prompts: Sequence[Prompt]) -> None:
        self.reward, self.prompts = reward, prompts
        self.texts: dict[int, str] = {}

    def extend(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]], texts: Sequence[str]) -> None:
        """See RewardSession."""
        self.texts.update(zip(rows, texts, strict=True))

    def scores(self, rows: Sequence[int]) -> list[Score]:
        """See RewardSession."""
        return self.reward.score([self.prompts[row] for row in rows], [self.texts[row] for row in rows])

    def keep(self, rows: Sequence[int]) -> None:
        """See RewardSession."""
        kept = set(rows)
        self.texts = {row: text for row, text in self.texts.items() if row in kept}
