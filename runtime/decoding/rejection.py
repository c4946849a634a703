"""The cut policy: when partial answers are compared and which of them stop.

An empty schedule is plain Best-of-N. Cuts compare the running answers of one prompt at equal token length; answers
that already finished compete with their final score.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from runtime.errors import ConfigError
from runtime.records import Cut


@dataclass(frozen=True, slots=True)
class CutSchedule:
    """At `tokens[i]` sampled tokens, the best `keep[i]` of the competing candidates stay.

    `contrast` candidates, the lowest of those that lose the first cut, still run to completion, so that pairs have
    complete rejected answers; they take no part in later cuts.
    """

    tokens: tuple[int, ...] = ()
    keep: tuple[float, ...] = ()
    contrast: int = 0

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.keep):
            raise ConfigError(
                f"cut tokens {list(self.tokens)} and keep fractions {list(self.keep)} differ in length; give one each"
            )
        if any(n < 1 for n in self.tokens) or list(self.tokens) != sorted(set(self.tokens)):
            raise ConfigError(f"cut tokens {list(self.tokens)} must be positive and strictly increasing")
        if any(not 0 < fraction <= 1 for fraction in self.keep):
            raise ConfigError(f"keep fractions {list(self.keep)} must be above 0 and at most 1")
        if self.contrast < 0:
            raise ConfigError(f"contrast = {self.contrast} must be 0 or above")

    def n_survivors(self, n: int) -> int:
        """How many of n candidates may still run behind the last cut."""
        for fraction in self.keep:
            n = keep_count(n, fraction)
        return n + (self.contrast if self.keep else 0)


def keep_count(n_competing: int, fraction: float) -> int:
    """How many of `n_competing` stay: the fraction rounded up, at least one."""
    return max(1, math.ceil(fraction * n_competing - 1e-9))  # 0.1 * 30 is 3.0000000000000004


@dataclass(slots=True)
class PromptCuts:
    """The cuts of one prompt: who still competes, who is exempt, and the record of every cut."""

    schedule: CutSchedule
    competing: set[int]
    exempt: set[int] = field(default_factory=set)
    final_scores: dict[int, float] = field(default_factory=dict)
    records: dict[int, list[Cut]] = field(default_factory=dict)
    n_done: int = 0

    @property
    def next_tokens(self) -> int | None:
        """Token count of the next cut; None after the last."""
        tokens = self.schedule.tokens
        return tokens[self.n_done] if self.n_done < len(tokens) else None

    def skip(self) -> None:
        """Pass a cut at which nobody runs any more."""
        self.n_done += 1

    def cut(self, running: Mapping[int, float]) -> list[int]:
        """Apply the next cut and return the candidates to drop.

        running: partial scores of the competing candidates that are not finished. Finished ones must be in
        `final_scores`; a finished candidate that loses stays complete, but no longer competes. Ties go to the
        lower candidate index.
        """
        n_tokens, fraction = self.schedule.tokens[self.n_done], self.schedule.keep[self.n_done]
        finished = {index: score for index, score in self.final_scores.items() if index in self.competing}
        ranked = _ranked({**finished, **running})
        self.competing = set(ranked[: keep_count(len(ranked), fraction)])
        losers = [index for index in ranked if index in running and index not in self.competing]
        if self.n_done == 0 and self.schedule.contrast:
            self.exempt.update(losers[-self.schedule.contrast :])
        dropped = [index for index in losers if index not in self.exempt]
        for index, score in running.items():
            record = Cut(n_tokens, score, kept=index not in dropped)
            self.records.setdefault(index, []).append(record)
        self.n_done += 1
        return dropped


def _ranked(scores: Mapping[int, float]) -> Sequence[int]:
    return sorted(scores, key=lambda index: (-scores[index], index))
