"""From logits to the next token: truncation, then Gumbel-max with counter-based noise."""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.errors import ConfigError
from runtime.randomness import gumbel

HEAD_TOKENS = 256  # how many of the most likely tokens top_p looks at first


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How candidates are drawn. `temperature` 0 is greedy, `top_k` 0 and `top_p` 1 keep the whole vocabulary."""

    n: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        rules = (
            (self.n >= 1, f"n = {self.n} must be at least 1"),
            (self.temperature >= 0, f"temperature = {self.temperature} must be 0 (greedy) or above"),
            (self.top_k >= 0, f"top_k = {self.top_k} must be 0 (off) or above"),
            (0 < self.top_p <= 1, f"top_p = {self.top_p} must be above 0 and at most 1 (off)"),
            (self.max_new_tokens >= 1, f"max_new_tokens = {self.max_new_tokens} must be at least 1"),
        )
        for holds, message in rules:
            if not holds:
                raise ConfigError(message)


def sample(logits: Tensor, keys: Tensor, position: Tensor, config: SamplingConfig) -> Tensor:
    """Next token ids, int64 of shape (rows,).

    logits: (rows, vocabulary); keys: int64 (rows,) from `row_key`; position: int64 (rows,), tokens sampled so far.
    """
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.float() / config.temperature
    n_vocabulary = scaled.shape[-1]
    if config.top_k == 0 and config.top_p == 1:
        return gumbel(keys, position, n_vocabulary).add_(scaled).argmax(dim=-1)
    support, token_ids = _truncate(scaled, config)
    choice = gumbel(keys, position, token_ids).add_(support).argmax(dim=-1, keepdim=True)
    return token_ids.gather(-1, choice).squeeze(-1)


def _truncate(scaled: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """The kept logits, best first, and their token ids, both (rows, k); `-inf` marks what top_p removed.

    top_k acts first; top_p keeps the smallest set of most likely tokens whose probability reaches it, and the
    tokens that tie with its last.
    """
    n_vocabulary = scaled.shape[-1]
    if config.top_k:
        support, token_ids = scaled.topk(min(config.top_k, n_vocabulary), dim=-1)
        if config.top_p == 1:
            return support, token_ids
        lowest = _lowest_kept(support, support.logsumexp(dim=-1, keepdim=True), config.top_p)
        return support.masked_fill(support < lowest, -torch.inf), token_ids
    total = scaled.logsumexp(dim=-1, keepdim=True)
    # A short head holds the kept tokens of almost every row: sorting the whole vocabulary is the exception.
    support, token_ids = scaled.topk(min(HEAD_TOKENS, n_vocabulary), dim=-1)
    lowest = _lowest_kept(support, total, config.top_p)
    if support.shape[-1] < n_vocabulary and bool((lowest == support[:, -1:]).any()):
        support, token_ids = scaled.sort(dim=-1, descending=True)
        lowest = _lowest_kept(support, total, config.top_p)
    return support.masked_fill(support < lowest, -torch.inf), token_ids


def _lowest_kept(support: Tensor, total: Tensor, top_p: float) -> Tensor:
    """The smallest logit that top_p keeps, (rows, 1); support is sorted, total is the log of the whole mass."""
    probabilities = (support - total).exp()
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the tokens above
    n_kept = (before < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    return support.gather(-1, n_kept - 1)
