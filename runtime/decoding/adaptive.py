"""The adaptive cut policy: as many candidates stay as the partial scores of this prompt leave in doubt.

A calibration says how well the score of a partial answer predicts the final one. With it, every running candidate has
a normal distribution of final scores, and the probability that it will be the best of its prompt is an integral.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.special import ndtr

from runtime.decoding.rejection import Scores, check_contrast, check_cut_tokens, rank
from runtime.errors import ConfigError
from runtime.records import Cut

GRID = 400  # points of the integrals


@dataclass(frozen=True, slots=True)
class Fit:
    """Final scores given partial ones at a token count: normal around intercept + slope * partial score."""

    n_tokens: int
    intercept: float
    slope: float
    residual: float  # standard deviation

    def __post_init__(self) -> None:
        for name in ("slope", "residual"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"the {name} at {self.n_tokens} tokens is {getattr(self, name)}; it must be above 0")


@dataclass(frozen=True)
class AdaptiveCuts:
    """Keeps the fewest candidates that hold the eventual winner with probability `confidence`.

    With `first_wave`, so many candidates are drawn at first, and as many again as long as their expected gain over the
    best so far is at least `min_gain` standard deviations of this prompt's scores (the stopping rule of a Pandora's
    box, arXiv 2510.01394, with the normal distribution above).
    """

    fits: tuple[Fit, ...]
    confidence: float = 0.95
    contrast: int = 0
    first_wave: int | None = None
    min_gain: float = 0.05

    def __post_init__(self) -> None:
        check_cut_tokens([fit.n_tokens for fit in self.fits])
        check_contrast(self.contrast)
        if not self.fits:
            raise ConfigError("adaptive cuts need a calibration; run `winnow calibrate` and name its result")
        if not 0 < self.confidence <= 1:
            raise ConfigError(f"confidence = {self.confidence} must be above 0 and at most 1")
        if self.first_wave is not None and self.first_wave < 2:
            raise ConfigError(f"first_wave = {self.first_wave} must be at least 2; a spread needs two scores")
        if self.min_gain < 0:
            raise ConfigError(f"min_gain = {self.min_gain} must be 0 or above")

    @cached_property
    def tokens(self) -> Sequence[int]:
        """See CutPolicy."""
        return [fit.n_tokens for fit in self.fits]

    @property
    def is_cutting(self) -> bool:
        """See CutPolicy."""
        return True

    def kept(self, stage: int, running: Scores, finished: Scores) -> set[int]:
        """See CutPolicy."""
        best_finished, ranked, fit = rank(finished)[:1], rank(running), self.fits[stage]
        means = torch.tensor([fit.intercept + fit.slope * running[index] for index in ranked], dtype=torch.float64)
        chances = win_chances(means, fit.residual, finished[best_finished[0]] if best_finished else None)
        # The best finished answer needs nobody to run for what it may win.
        needed = float(chances.sum()) - (1 - self.confidence)
        n_kept = 0 if needed <= 0 else int((chances.cumsum(0) < needed - 1e-12).sum()) + 1
        return {*best_finished, *ranked[: n_kept if best_finished else max(1, n_kept)]}

    def n_survivors(self, n: int) -> int:
        """See CutPolicy; a guess, since it depends on the scores."""
        return max(1, n // 4) + self.contrast

    def n_first(self, n: int) -> int:
        """See CutPolicy."""
        return n if self.first_wave is None else min(n, self.first_wave)

    def is_worth_more(self, cuts: Mapping[int, Sequence[Cut]], finals: Scores, n_more: int) -> bool:
        """See CutPolicy."""
        if not finals:
            return True
        first = self.fits[0]
        partial = [first.intercept + first.slope * found[0].score for found in cuts.values()]
        scores = torch.tensor([*partial, *(score for index, score in finals.items() if index not in cuts)])
        # What partial scores leave open spreads the final ones further.
        spread = math.sqrt(float(scores.var(correction=0)) + first.residual**2 * len(partial) / len(scores))
        gain = expected_gain(float(scores.mean()), spread, max(finals.values()), n_more)
        return gain >= self.min_gain * spread


def win_chances(means: Tensor, residual: float, threshold: float | None) -> Tensor:
    """Probability of each candidate to be the best, float64 (candidates,); scores are independent N(mean, residual^2).

    threshold: a score that is known already; beating it is part of winning.
    """
    low, high = float(means.min()) - 8 * residual, float(means.max()) + 8 * residual
    start = low if threshold is None else max(low, min(threshold, high))
    grid = torch.linspace(start, high, GRID, dtype=torch.float64)
    z = (grid[None] - means[:, None]) / residual  # (candidates, grid)
    log_below = ndtr(z).clamp(min=1e-300).log()
    log_density = -0.5 * z**2 - math.log(residual * math.sqrt(2 * math.pi))
    # Its own density, and everybody else below.
    return torch.trapezoid((log_density + log_below.sum(dim=0) - log_below).exp(), grid, dim=1).clamp(0, 1)


def expected_gain(mean: float, spread: float, best: float, n: int) -> float:
    """E[max(0, max of n draws of N(mean, spread^2) - best)]."""
    if spread == 0:
        return max(0.0, mean - best)
    grid = torch.linspace(best, max(best, mean) + 10 * spread, GRID, dtype=torch.float64)
    return float(torch.trapezoid(1 - ndtr((grid - mean) / spread) ** n, grid))
