"""Losses as pure functions of log-probabilities. Each returns one loss per sample and its metrics.

S is the sum of an answer's token log-probabilities: prompt and padding masked, the end token included.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Summed log-probabilities of chosen and rejected answers, each (pairs,)."""

    chosen: Tensor
    rejected: Tensor


@dataclass(frozen=True, slots=True)
class Losses:
    """One loss per sample, and detached metrics per sample."""

    per_sample: Tensor
    metrics: dict[str, Tensor]


def dpo(policy: PairLogps, reference: PairLogps, beta: float, label_smoothing: float = 0.0) -> Losses:
    """Direct preference optimisation (arXiv 2305.18290, eq. 7): -log sigmoid(beta h).

    h = (S_w - S_w^ref) - (S_l - S_l^ref). With label smoothing e, the conservative form of its authors:
    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h).
    """
    chosen_rewards = beta * (policy.chosen - reference.chosen)
    rejected_rewards = beta * (policy.rejected - reference.rejected)
    margins = chosen_rewards - rejected_rewards
    per_sample = -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
    metrics = {
        "rewards/chosen": chosen_rewards.detach(),
        "rewards/rejected": rejected_rewards.detach(),
        "rewards/margins": margins.detach(),
        "rewards/accuracies": (margins > 0).to(margins.dtype),  # strict: 0 at the first step
        "logps/chosen": policy.chosen.detach(),
        "logps/rejected": policy.rejected.detach(),
    }
    return Losses(per_sample, metrics)


def sft(logps: Tensor, n_tokens: Tensor) -> Losses:
    """Negative log-likelihood per answer token of each sample: -S / n. logps and n_tokens: (samples,)."""
    per_sample = -logps / n_tokens
    return Losses(per_sample, {"logps/chosen": logps.detach()})


def with_nll(losses: Losses, chosen: Tensor, n_tokens: Tensor, weight: float) -> Losses:
    """A pairwise loss plus the chosen answer's negative log-likelihood per token (arXiv 2404.19733, eq. 1).

    Keeps the chosen answer likely where a pairwise loss alone would lower both sides. chosen and n_tokens: (pairs,).
    """
    nll = sft(chosen, n_tokens).per_sample
    return Losses(losses.per_sample + weight * nll, losses.metrics | {"nll": nll.detach()})


def answer_logps(logits: Tensor, token_ids: Tensor, is_answer: Tensor) -> Tensor:
    """S of every row, in float32 at least. logits (rows, T, V); token_ids and is_answer (rows, T)."""
    scores = logits[:, :-1]
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    targets = token_ids[:, 1:]
    logps = scores.gather(-1, targets[..., None]).squeeze(-1) - scores.logsumexp(dim=-1)  # (rows, T - 1)
    return torch.where(is_answer[:, 1:], logps, 0.0).sum(dim=-1)
