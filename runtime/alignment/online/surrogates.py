"""What is minimised, per token and per answer. Pure functions of (rows, T) tensors."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["sequence", "token", "constant"]
LOG_RATIO_LIMIT = 20.0  # beyond it exp says nothing but "far away", and overflows soon after


@dataclass(frozen=True, slots=True)
class Clip:
    """How far the ratio may move: from 1 - low to 1 + high. Equal sides are PPO's, a wider upper one is DAPO's."""

    low: float = 0.2
    high: float = 0.2


def clipped_losses(logps: Tensor, old: Tensor, advantages: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate per token (arXiv 1707.06347, eq. 7), max(-rho A, -clip(rho) A), and where it clips.

    All (rows, T). DAPO's clip-higher (arXiv 2503.14476, eq. 10) is a `clip` with two sides.
    """
    ratio = (logps - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    free = -ratio * advantages
    held = -ratio.clamp(1 - clip.low, 1 + clip.high) * advantages
    return torch.maximum(free, held), held > free


def clipped_value_losses(values: Tensor, old: Tensor, returns: Tensor, limit: float) -> Tensor:
    """Half the larger square error of the value and of the value held within `limit` of the old one, (rows, T)."""
    held = old + (values - old).clamp(-limit, limit)
    return 0.5 * torch.maximum((values - returns).square(), (held - returns).square())


def k3(logps: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) per token, never negative and unbiased on the policy's own samples: e^d - d - 1 with
    d = log reference - log policy (arXiv 2402.03300, eq. 4)."""
    difference = (reference - logps).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return difference.exp() - difference - 1


def per_answer(losses: Tensor, mask: Tensor, divisor: float | None) -> Tensor:
    """Losses per token to one per answer, (rows,), whose mean over the rows is the objective.

    Divided by the answer's own tokens (None: GRPO), by the mean length of all answers of the update, so that every
    token weighs alike (DAPO), or by the greatest length there can be (Dr. GRPO); `divisor_of` says which.
    """
    sums = summed(losses, mask)
    return sums / mask.sum(dim=1).clamp(min=1) if divisor is None else sums / divisor


def divisor_of(how: Aggregation, mask: Tensor, max_tokens: int) -> float | None:
    """For `per_answer`; mask (rows, T) of all answers of an update, however they are split into passes."""
    if how == "sequence":
        return None
    return float(mask.sum()) / max(len(mask), 1) if how == "token" else float(max_tokens)


def summed(values: Tensor, mask: Tensor) -> Tensor:
    """Over the answer's tokens, (rows,)."""
    return torch.where(mask, values, torch.zeros_like(values)).sum(dim=1)


def jbond_losses(
    best: Tensor, policy: Tensor, anchor: Tensor, advantages: Tensor, weights: tuple[float, float]
) -> Tensor:
    """J-BOND's surrogate per prompt (arXiv 2407.14622, algorithm 2 and eq. 19); its gradient is the update's. (rows,).

    (1 - beta) (-S(best of the anchor's two)) - beta A S(y) + gamma sg(S(y) - S_anchor(y)) S(y), where S is the sum of
    log-probabilities, A the return less its baseline and y the policy's own answer. weights: beta and gamma. The last
    term lowers KL(policy || anchor), as eq. 19 says; algorithm 2 prints its sign the other way round.

    best: S of the anchor's better answer under the policy; policy and anchor: S of y under each, all (rows,).
    """
    beta, gamma = weights
    forward = -best
    backward = -advantages.detach() * policy
    regulariser = (policy - anchor).detach() * policy
    return (1 - beta) * forward + beta * backward + gamma * regulariser
