"""From rewards to what each token is worth. Pure functions; rewards of one prompt's answers are a row.

A reward that is missing (an answer that could not be scored) is marked False in `is_scored`; its advantage is 0 and it
counts in no mean.
"""

import math

import torch
from torch import Tensor

REMAX_CLIP = 5.0
JBOND_PENALTY = -math.log(16.0)


def group_advantages(rewards: Tensor, is_scored: Tensor, is_scaled: bool = True, eps: float = 1e-4) -> Tensor:
    """GRPO (arXiv 2402.03300, 4.1.2): (r - mean) / (std + eps) over the answers to one prompt; (prompts, samples).

    The standard deviation is the unbiased one, as in TRL and verl. Unscaled is Dr. GRPO (arXiv 2503.20783, eq. 3).
    """
    n_scored = is_scored.sum(dim=1, keepdim=True)
    centred = _centred(rewards, is_scored, n_scored)
    if not is_scaled:
        return centred
    variance = centred.square().sum(dim=1, keepdim=True) / (n_scored - 1).clamp(min=1)
    return centred / (variance.sqrt() + eps)


def leave_one_out(rewards: Tensor, is_scored: Tensor) -> Tensor:
    """RLOO (arXiv 2402.14740, eq. 8): r less the mean of the other answers to its prompt; (prompts, samples)."""
    n_scored = is_scored.sum(dim=1, keepdim=True)
    return _centred(rewards, is_scored, n_scored) * n_scored / (n_scored - 1).clamp(min=1)


def has_spread(rewards: Tensor, is_scored: Tensor) -> Tensor:
    """Whether the scored answers to a prompt differ in reward: else there is nothing to learn from; (prompts,)."""
    high = rewards.masked_fill(~is_scored, -torch.inf).amax(dim=1)
    low = rewards.masked_fill(~is_scored, torch.inf).amin(dim=1)
    return high > low


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """GAE (arXiv 1506.02438, eq. 16) and the returns A + V, both (rows, T), 0 where the mask is.

    rewards and values are per token, (rows, T); the mask says which tokens are the answer's: one stretch per row.
    """
    advantages = torch.zeros_like(values)
    ahead = torch.zeros_like(values[:, 0])
    for place in reversed(range(values.shape[1])):
        is_last = place + 1 == values.shape[1]
        goes_on = torch.zeros_like(mask[:, 0]) if is_last else mask[:, place + 1]
        next_value = torch.zeros_like(ahead) if is_last else values[:, place + 1]
        surprise = rewards[:, place] + gamma * next_value * goes_on - values[:, place]
        ahead = torch.where(mask[:, place], surprise + gamma * lam * ahead * goes_on, torch.zeros_like(ahead))
        advantages[:, place] = ahead
    return advantages, torch.where(mask, advantages + values, torch.zeros_like(values))


def whitened(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Zero mean and unit variance over the tokens of the mask; 0 elsewhere."""
    inside = values[mask]
    if inside.numel() < 2:
        return torch.zeros_like(values)
    return torch.where(mask, (values - inside.mean()) / (inside.var() + eps).sqrt(), torch.zeros_like(values))


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """PPO's rewards: -kl_coef kl_t at each token, and the score at the last one; (rows, T).

    scores: (rows,); kl: the k1 estimate log policy - log reference of each token, (rows, T).
    """
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    return rewards + scores[:, None] * _is_last(mask)


def remax_returns(scores: Tensor, baselines: Tensor, kl: Tensor, mask: Tensor, kl_coef: float, gamma: float) -> Tensor:
    """ReMax (arXiv 2310.10505, algorithm 1): -kl_coef kl_t + gamma^(n - t + 1) clip(r - r_greedy, +-5), (rows, T).

    scores and baselines (those of the greedy answer): (rows,); t counts from 1 to n. The KL term, the clip and a
    gamma below 1 are those of the authors' code, where the discount touches the last token too.
    """
    after = mask.flip(1).cumsum(dim=1).flip(1)  # n - t + 1
    gain = (scores - baselines).clamp(-REMAX_CLIP, REMAX_CLIP)
    returns = -kl_coef * kl + gain[:, None] * gamma ** after.to(kl.dtype)
    return torch.where(mask, returns, torch.zeros_like(kl))


def jbond_rewards(scores: Tensor, anchors: Tensor) -> Tensor:
    """J-BOND (arXiv 2407.14622, eq. 18): -log 16 where an answer is below both of the anchor's, else 0; (rows,).

    anchors: (rows, 2). The comparison is strict: with rewards of few values it seldom fires.
    """
    return (scores < anchors.amin(dim=1)).to(scores.dtype) * JBOND_PENALTY


def quantile_rewards(scores: Tensor, references: Tensor) -> Tensor:
    """BOND (arXiv 2407.14622, eq. 9): log of the share of the reference's answers that are no better; (rows,).

    references: scores of k of its answers to the same prompt, (rows, k). No better one counts as half of one, so that
    the logarithm stays finite.
    """
    n_below = (references <= scores[:, None]).sum(dim=1).to(scores.dtype)
    return (n_below.clamp(min=0.5) / references.shape[1]).log()


def _centred(rewards: Tensor, is_scored: Tensor, n_scored: Tensor) -> Tensor:
    known = torch.where(is_scored, rewards, torch.zeros_like(rewards))
    mean = known.sum(dim=1, keepdim=True) / n_scored.clamp(min=1)
    return torch.where(is_scored, rewards - mean, torch.zeros_like(rewards))


def _is_last(mask: Tensor) -> Tensor:
    after = torch.cat((mask[:, 1:], torch.zeros_like(mask[:, :1])), dim=1)
    return mask & ~after
