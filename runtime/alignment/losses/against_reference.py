"""Pairwise losses that measure the policy against a frozen reference: DPO, IPO, DPOP, TDPO.

w and l are the chosen and the rejected answer, S is a sum of log-probabilities, r = S - S^ref, h = r_w - r_l.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from runtime.alignment.losses.records import AnswerLogps, Losses, PairLogps, both, rewards
from runtime.errors import ConfigError


def dpo(policy: PairLogps, reference: PairLogps, beta: float, label_smoothing: float = 0.0) -> Losses:
    """Direct preference optimisation (arXiv 2305.18290, eq. 7): -log sigmoid(beta h), (pairs,).

    With label smoothing e, the conservative form of its authors: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h).
    """
    won, lost = _gains(policy, reference)
    return Losses(smoothed(beta * (won - lost), label_smoothing), _metrics(policy, beta * won, beta * lost))


def ipo(policy: PairLogps, reference: PairLogps, beta: float, length_norm: Literal["sum", "mean"]) -> Losses:
    """Identity preference optimisation (arXiv 2310.12036, eq. 17): (h - 1 / (2 beta))^2, (pairs,).

    beta is the paper's tau. sum: h as it stands in the paper. mean: every r is divided by its own answer's tokens.
    """
    won, lost = _gains(policy, reference)
    metrics = _metrics(policy, beta * won, beta * lost)
    if length_norm == "mean":
        chosen, rejected = both(policy)
        won, lost = won / chosen.n_tokens, lost / rejected.n_tokens
    return Losses((won - lost - 1 / (2 * beta)) ** 2, metrics)


def dpop(policy: PairLogps, reference: PairLogps, beta: float, penalty_weight: float) -> Losses:
    """DPO-positive (arXiv 2402.13228): -log sigmoid(beta (h - lambda max(0, S_w^ref - S_w))), (pairs,).

    The penalty holds the chosen answer at least as likely as under the reference.
    """
    won, lost = _gains(policy, reference)
    fall = torch.relu(-won)  # not clamp: at first nothing has fallen, and its gradient there would be the penalty's
    per_sample = -logsigmoid(beta * (won - lost - penalty_weight * fall))
    extra = {"penalty": (beta * penalty_weight * fall).detach(), "penalty_active": (fall > 0).to(fall.dtype)}
    return Losses(per_sample, _metrics(policy, beta * won, beta * lost) | extra)


def tdpo1(policy: PairLogps, reference: PairLogps, beta: float) -> Losses:
    """Token-level DPO 1 (arXiv 2404.11999): -log sigmoid(beta (h - (D_l - D_w))), (pairs,).

    D = sum over the answer of KL(reference || policy), in `policy.*.kl` (pairs,); gradients flow through both.
    """
    won, lost = _gains(policy, reference)
    d_won, d_lost = _divergences(policy)
    return _token_level(policy, (won, lost), beta, d_lost - d_won)


def tdpo2(policy: PairLogps, reference: PairLogps, beta: float, alpha: float) -> Losses:
    """Token-level DPO 2 (arXiv 2404.11999): -log sigmoid(beta (h - alpha (D_l - sg(D_w)))), (pairs,).

    sg stops the gradient: of the chosen answer's divergence alone.
    """
    won, lost = _gains(policy, reference)
    d_won, d_lost = _divergences(policy)
    return _token_level(policy, (won, lost), beta, alpha * (d_lost - d_won.detach()))


def smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid, with a share of the labels taken as flipped."""
    if not label_smoothing:
        return -logsigmoid(logits)
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def _token_level(policy: PairLogps, gains: tuple[Tensor, Tensor], beta: float, difference: Tensor) -> Losses:
    """The rewards of both variants hold the divergence: beta (r + D), as its authors log them."""
    (won, lost), (d_won, d_lost) = gains, _divergences(policy)
    metrics = _metrics(policy, beta * (won + d_won), beta * (lost + d_lost))
    extra = {"kl/chosen": d_won.detach(), "kl/rejected": d_lost.detach()}
    return Losses(-logsigmoid(beta * (won - lost - difference)), metrics | extra)


def _gains(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
    """r_w and r_l."""
    (chosen, rejected), (ref_chosen, ref_rejected) = both(policy), both(reference)
    return chosen.logps - ref_chosen.logps, rejected.logps - ref_rejected.logps


def _divergences(policy: PairLogps) -> tuple[Tensor, Tensor]:
    """D_w and D_l."""
    return _divergence(both(policy)[0]), _divergence(both(policy)[1])


def _divergence(answers: AnswerLogps) -> Tensor:
    if answers.kl is None:
        raise ConfigError(
            "tdpo needs the reference's logits at every step, not stored log-probabilities; keep the reference model"
        )
    return answers.kl


def _metrics(policy: PairLogps, chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    chosen, rejected = both(policy)
    logps = {"logps/chosen": chosen.logps.detach(), "logps/rejected": rejected.logps.detach()}
    return rewards(chosen_rewards, rejected_rewards) | logps
