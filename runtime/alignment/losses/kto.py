"""KTO: every answer alone is good or bad, measured against how far the policy has moved on the whole."""

import torch
from torch import Tensor

from runtime.alignment.losses.records import Losses, PairLogps, both, rewards
from runtime.errors import InputError


def kto(policy: PairLogps, reference: PairLogps, beta: float, weights: tuple[float, float], zero: Tensor) -> Losses:
    """Kahneman-Tversky optimisation (arXiv 2402.01306, eq. 8), (pairs,): the mean of both answers' losses.

    Chosen: lambda_D (1 - sigmoid(beta (r_w - z))); rejected: lambda_U (1 - sigmoid(beta (z - r_l))); r = S - S^ref,
    weights = (lambda_D, lambda_U), zero = z, a scalar from `reference_point`. The mean over a batch of pairs is the
    mean over its answers.
    """
    (chosen, rejected), (ref_chosen, ref_rejected) = both(policy), both(reference)
    won, lost = chosen.logps - ref_chosen.logps, rejected.logps - ref_rejected.logps
    desirable = weights[0] * torch.sigmoid(-beta * (won - zero))
    undesirable = weights[1] * torch.sigmoid(-beta * (zero - lost))
    metrics = rewards(beta * won, beta * lost) | {
        "logps/chosen": chosen.logps.detach(),
        "logps/rejected": rejected.logps.detach(),
        "kl": zero.expand_as(won),
    }
    return Losses((desirable + undesirable) / 2, metrics)


def reference_point(policy: Tensor, reference: Tensor) -> Tensor:
    """z = max(0, mean(S - S^ref)) over answers that stand under other prompts than their own; without gradient.

    policy and reference: S of the same answers (any number,), at least one.
    """
    if policy.numel() == 0:
        raise InputError("kto has no mismatched answers to measure its zero by; use batches of two pairs or more")
    return (policy - reference).detach().mean().clamp(min=0)
