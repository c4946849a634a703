"""Losses that need no reference: the likelihood of chosen answers, ORPO, SimPO.

S is a sum of log-probabilities over an answer, n its tokens, m = S / n; w and l the chosen and the rejected answer.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from runtime.alignment.losses.against_reference import smoothed
from runtime.alignment.losses.records import AnswerLogps, Losses, PairLogps, both, rewards


def sft(answers: AnswerLogps, is_token_mean: bool = False) -> Losses:
    """Supervised fine-tuning, and best-of-n distillation when the answers are the best of n: -S / n, (samples,).

    is_token_mean: -S divided by the batch's mean length instead, so that the mean over the batch is the mean over its
    tokens (TRL); a sample's loss then depends on its batch.
    """
    return Losses(_nll(answers.logps, answers.n_tokens, is_token_mean), {"logps/chosen": answers.logps.detach()})


def with_nll(losses: Losses, chosen: AnswerLogps, weight: float, is_token_mean: bool = False) -> Losses:
    """A pairwise loss plus weight times the chosen answer's `sft` (arXiv 2404.19733, eq. 1), (pairs,).

    Keeps the chosen answer likely where a pairwise loss alone would lower both sides.
    """
    nll = _nll(chosen.logps, chosen.n_tokens, is_token_mean)
    return Losses(losses.per_sample + weight * nll, losses.metrics | {"nll": nll.detach()})


def orpo(
    policy: PairLogps, weight: float, sft_term: Literal["answer", "sequence"], is_token_mean: bool = False
) -> Losses:
    """Odds-ratio preference optimisation (arXiv 2403.07691, eq. 6 and 7): NLL_w - lambda log sigmoid(z), (pairs,).

    z = log odds_w - log odds_l with odds = e^m / (1 - e^m). NLL_w: per token of the answer, or of prompt and answer.
    """
    chosen, rejected = both(policy)
    log_odds = _log_odds(chosen.means) - _log_odds(rejected.means)
    if sft_term == "sequence":
        assert chosen.all_logps is not None and chosen.n_all is not None, "needs(settings).whole_sequence says so"
        nll = _nll(chosen.all_logps, chosen.n_all, is_token_mean)
    else:
        nll = _nll(chosen.logps, chosen.n_tokens, is_token_mean)
    metrics = rewards(weight * chosen.means, weight * rejected.means) | _logps(policy)
    return Losses(nll - weight * logsigmoid(log_odds), metrics | {"nll": nll.detach(), "log_odds": log_odds.detach()})


def simpo(policy: PairLogps, beta: float, gamma: float, label_smoothing: float = 0.0) -> Losses:
    """Simple preference optimisation (arXiv 2405.14734, eq. 6): -log sigmoid(beta (m_w - m_l) - gamma), (pairs,)."""
    chosen, rejected = both(policy)
    margins = beta * chosen.means - beta * rejected.means
    metrics = rewards(beta * chosen.means, beta * rejected.means) | _logps(policy)
    return Losses(smoothed(margins - gamma, label_smoothing), metrics)


def _nll(logps: Tensor, n_tokens: Tensor, is_token_mean: bool) -> Tensor:
    return -logps / (n_tokens.to(logps.dtype).mean() if is_token_mean else n_tokens)


def _log_odds(means: Tensor) -> Tensor:
    """m - log(1 - e^m), finite for an answer of probability 1 too."""
    below_zero = means.clamp(max=-torch.finfo(means.dtype).eps)
    return means - torch.log(-torch.expm1(below_zero))


def _logps(policy: PairLogps) -> dict[str, Tensor]:
    chosen, rejected = both(policy)
    return {"logps/chosen": chosen.logps.detach(), "logps/rejected": rejected.logps.detach()}
