"""The cut policies: when partial answers are compared and which of them stop.

A policy without cuts is plain Best-of-N. Cuts compare the running answers of one prompt at equal token length; answers
that already finished compete with their final score. Whoever scores best always stays.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from runtime.errors import ConfigError
from runtime.records import Cut

Scores = Mapping[int, float]  # by candidate index


class CutPolicy(Protocol):
    """Decides at each cut who stays, and after each wave of candidates whether the next one is worth drawing."""

    @property
    def tokens(self) -> Sequence[int]:
        """Token counts of the cuts, rising; empty for a policy without cuts and for one that waits for full memory."""
        ...

    @property
    def contrast(self) -> int:
        """Losers of a first cut, the lowest, that still run to completion, so that pairs have complete rejected
        answers; they take no part in later cuts."""
        ...

    @property
    def is_cutting(self) -> bool:
        """Whether partial answers are ever scored."""
        ...

    def kept(self, stage: int, running: Scores, finished: Scores) -> set[int]:
        """Who stays at cut number `stage` (from 0), the best always; ties go to the lower candidate index."""
        ...

    def n_survivors(self, n: int) -> int:
        """About how many of n candidates still run behind the last cut; sizes memory, decides nothing."""
        ...

    def n_first(self, n: int) -> int:
        """How many of n candidates are drawn at first."""
        ...

    def is_worth_more(self, cuts: Mapping[int, Sequence[Cut]], finals: Scores, n_more: int) -> bool:
        """Whether `n_more` further candidates are worth drawing, after those with these cuts and final scores."""
        ...


@dataclass(frozen=True, slots=True)
class _OneWave:
    """What policies share that draw all candidates at once."""

    def n_first(self, n: int) -> int:
        """See CutPolicy."""
        return n

    def is_worth_more(self, cuts: Mapping[int, Sequence[Cut]], finals: Scores, n_more: int) -> bool:
        """See CutPolicy."""
        return True


@dataclass(frozen=True, slots=True)
class CutSchedule(_OneWave):
    """At `tokens[i]` sampled tokens, the best `keep[i]` of the competing candidates stay. Empty: plain Best-of-N."""

    tokens: tuple[int, ...] = ()
    keep: tuple[float, ...] = ()
    contrast: int = 0

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.keep):
            raise ConfigError(
                f"cut tokens {list(self.tokens)} and keep fractions {list(self.keep)} differ in length; give one each"
            )
        check_cut_tokens(self.tokens)
        if any(not 0 < fraction <= 1 for fraction in self.keep):
            raise ConfigError(f"keep fractions {list(self.keep)} must be above 0 and at most 1")
        check_contrast(self.contrast)

    @classmethod
    def for_compute(cls, tokens: Sequence[int], target: float, n_answer: int, contrast: int = 0) -> "CutSchedule":
        """Equal keep fractions so that a prompt costs `target` of what plain Best-of-N does, answers having
        `n_answer` tokens; ConfigError when even one survivor costs more."""
        check_cut_tokens(tokens)
        steps = [b - a for a, b in zip([0, *tokens], [*tokens, n_answer], strict=True)]
        if not tokens or any(step <= 0 for step in steps) or not steps[0] / n_answer < target <= 1:
            least = f"above {tokens[0] / n_answer:.2f}, the share up to the first cut," if tokens else "1"
            raise ConfigError(
                f"cut target {target} cannot be reached with cuts at {list(tokens)} of {n_answer} tokens; it must be "
                f"{least} and at most 1, and the cuts below the length of an answer"
            )
        low, high = 0.0, 1.0
        for _ in range(60):
            keep = (low + high) / 2
            share = sum(step * keep**stage for stage, step in enumerate(steps)) / n_answer
            low, high = (keep, high) if share < target else (low, keep)
        return cls(tuple(tokens), (high,) * len(tokens), contrast)

    @property
    def is_cutting(self) -> bool:
        """See CutPolicy."""
        return bool(self.tokens)

    def kept(self, stage: int, running: Scores, finished: Scores) -> set[int]:
        """See CutPolicy."""
        ranked = rank({**finished, **running})
        return set(ranked[: keep_count(len(ranked), self.keep[stage])])

    def n_survivors(self, n: int) -> int:
        """See CutPolicy."""
        for fraction in self.keep:
            n = keep_count(n, fraction)
        return n + (self.contrast if self.keep else 0)


@dataclass(frozen=True, slots=True)
class MemoryCuts(_OneWave):
    """Algorithm 1 of speculative rejection (arXiv 2410.20290): one prompt at a time; whenever the KV budget is full,
    the worst `alpha` of its candidates stop. alpha 0 is plain Best-of-N and needs memory for all of it."""

    alpha: float = 0.5
    tokens: tuple[int, ...] = field(default=(), init=False)
    contrast: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise ConfigError(f"alpha = {self.alpha} must be 0 or above, and below 1")

    @property
    def is_cutting(self) -> bool:
        """See CutPolicy."""
        return self.alpha > 0

    def kept(self, stage: int, running: Scores, finished: Scores) -> set[int]:
        """See CutPolicy. Rounded down, unlike a schedule: a cut that drops nobody would leave memory full."""
        ranked = rank({**finished, **running})
        n_kept = math.floor((1 - self.alpha) * len(ranked) + 1e-9)
        return set(ranked[: max(1, n_kept - (n_kept == len(ranked) and self.is_cutting))])

    def n_survivors(self, n: int) -> int:
        """See CutPolicy."""
        return n


def keep_count(n_competing: int, fraction: float) -> int:
    """How many of `n_competing` stay: the fraction rounded up, at least one."""
    return max(1, math.ceil(fraction * n_competing - 1e-9))  # 0.1 * 30 is 3.0000000000000004


def rank(scores: Scores) -> list[int]:
    """Candidates, best first; ties go to the lower index."""
    return sorted(scores, key=lambda index: (-scores[index], index))


def check_cut_tokens(tokens: Sequence[int]) -> None:
    """ConfigError unless the token counts are positive and rise."""
    if any(n < 1 for n in tokens) or list(tokens) != sorted(set(tokens)):
        raise ConfigError(f"cut tokens {list(tokens)} must be positive and strictly increasing")


def check_contrast(contrast: int) -> None:
    """ConfigError for a negative number."""
    if contrast < 0:
        raise ConfigError(f"contrast = {contrast} must be 0 or above")


@dataclass(slots=True)
class PromptCuts:
    """The cuts of one prompt: who still competes, who is exempt, and the record of every cut."""

    policy: CutPolicy
    competing: set[int]
    exempt: set[int] = field(default_factory=set)
    final_scores: dict[int, float] = field(default_factory=dict)
    records: dict[int, list[Cut]] = field(default_factory=dict)
    n_done: int = 0

    @property
    def next_tokens(self) -> int | None:
        """Token count of the next cut; None after the last."""
        tokens = self.policy.tokens
        return tokens[self.n_done] if self.n_done < len(tokens) else None

    def begin_wave(self, indices: Sequence[int]) -> None:
        """Further candidates start; of those before them, the best finished one still competes."""
        finished = rank({index: s for index, s in self.final_scores.items() if index in self.competing})
        self.competing = {*finished[:1], *indices}
        self.n_done = 0

    def skip(self) -> None:
        """Pass a cut at which nobody runs any more."""
        self.n_done += 1

    def cut(self, n_tokens: int, running: Scores) -> list[int]:
        """Apply the next cut, at `n_tokens` tokens, and return the candidates to drop.

        running: partial scores of the competing candidates that are not finished. Finished ones must be in
        `final_scores`; a finished candidate that loses stays complete, but no longer competes.
        """
        finished = {index: score for index, score in self.final_scores.items() if index in self.competing}
        self.competing = self.policy.kept(self.n_done, running, finished)
        losers = [index for index in rank(running) if index not in self.competing]
        if self.n_done == 0 and self.policy.contrast:
            self.exempt.update(losers[-self.policy.contrast :])
        dropped = [index for index in losers if index not in self.exempt]
        for index, score in running.items():
            self.records.setdefault(index, []).append(Cut(n_tokens, score, kept=index not in dropped))
        self.n_done += 1
        return dropped
