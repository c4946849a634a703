"""From logits to the next token: penalty, temperature, truncation, then Gumbel-max with counter-based noise."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.errors import ConfigError
from runtime.randomness import gumbel

HEAD_TOKENS = 256  # how many of the most likely tokens top_p looks at first
FLAT_VOCABULARY = 4096  # up to here every token gets its own noise, above it blocks come first
BLOCK_TOKENS = 32
FOLD = 4  # how many values `top_k` compares at once
_BLOCK_STREAM = 0x5851F42D4C957F2D  # keeps the noise of blocks apart from that of tokens


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How candidates are drawn. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 keep every token.

    The order is that of transformers: repetition penalty, temperature, top_k, top_p, min_p. An answer ends before the
    first of the `stop` strings.
    """

    n: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rules = (
            (self.n >= 1, f"n = {self.n} must be at least 1"),
            (self.temperature >= 0, f"temperature = {self.temperature} must be 0 (greedy) or above"),
            (self.top_k >= 0, f"top_k = {self.top_k} must be 0 (off) or above"),
            (0 < self.top_p <= 1, f"top_p = {self.top_p} must be above 0 and at most 1 (off)"),
            (0 <= self.min_p < 1, f"min_p = {self.min_p} must be 0 (off) or above, and below 1"),
            (self.repetition_penalty > 0, f"repetition_penalty = {self.repetition_penalty} must be above 0 (1 is off)"),
            (self.max_new_tokens >= 1, f"max_new_tokens = {self.max_new_tokens} must be at least 1"),
            (all(self.stop), "stop has an empty string; remove it"),
        )
        for holds, message in rules:
            if not holds:
                raise ConfigError(message)


def sample(logits: Tensor, keys: Tensor, position: Tensor, config: SamplingConfig) -> Tensor:
    """Next token ids, int64 of shape (rows,); -1 for a row whose largest logit is not finite.

    logits: (rows, vocabulary); keys: int64 (rows,) from `row_key`; position: int64 (rows,), tokens sampled so far.
    """
    return _sample(logits, keys, position, config, _winner)[0]


def sample_with_lead(logits: Tensor, keys: Tensor, position: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """The tokens of `sample`, and how far each is ahead of the next best, (rows,).

    The unit is the largest scaled logit, or 1 where that is smaller: what rounding adds to logits grows with them.
    """
    tokens, lead, best = _sample(logits, keys, position, config, _winner_and_lead)
    assert lead is not None
    return tokens, lead / best.abs().clamp(min=1)


def log_probabilities(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Log of the law of `sample`, (rows, vocabulary); temperature 0 has none."""
    if config.top_k == 0 and config.top_p == 1:
        scaled = _scaled(logits, config)
        return _above_min_p(scaled, scaled.amax(dim=-1, keepdim=True), config).log_softmax(dim=-1)
    support, token_ids = _truncate(logits, config)
    support = _above_min_p(support, support[:, :1], config)
    everything = torch.full(logits.shape, -torch.inf, dtype=support.dtype, device=logits.device)
    return everything.scatter_(-1, token_ids, support).log_softmax(dim=-1)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Repetition penalty of arXiv 1909.05858, section 4.1: logits of seen tokens divided, negative ones multiplied."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def top_k(values: Tensor, k: int, is_sorted: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest of each row, as floats, and their places, both (rows, k), largest first if they shall be sorted.

    Much faster than `torch.topk` on a CPU (5 times at 32,000 values, k = 50): the k largest lie in those k columns of
    the folded row whose maxima are largest, and maxima of columns are cheap.
    """
    n_values = values.shape[-1]
    n_columns = n_values // FOLD
    if values.is_cuda or n_columns < 2 * k:
        return _floating(values).topk(min(k, n_values), dim=-1, sorted=is_sorted)
    folded = values[:, : FOLD * n_columns].view(-1, FOLD, n_columns)
    columns = top_k(_floating(folded.amax(dim=1)), k, is_sorted=False)[1]
    candidates = folded.gather(2, columns[:, None].expand(-1, FOLD, -1)).flatten(1)
    level = torch.arange(0, FOLD * n_columns, n_columns, device=values.device)
    places = (columns[:, None] + level[:, None]).flatten(1)
    if FOLD * n_columns < n_values:
        rest = torch.arange(FOLD * n_columns, n_values, device=values.device).expand(len(values), -1)
        candidates = torch.cat((candidates, values[:, FOLD * n_columns :]), dim=-1)
        places = torch.cat((places, rest), dim=-1)
    best, chosen = _floating(candidates).topk(k, dim=-1, sorted=is_sorted)
    return best, places.gather(-1, chosen)


def _winner(scores: Tensor) -> tuple[Tensor, None]:
    """Place of the largest of each row, (rows,)."""
    return scores.argmax(dim=-1), None


def _winner_and_lead(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Likewise, and what it has above the second, (rows,)."""
    if scores.shape[-1] == 1:
        return scores.argmax(dim=-1), torch.full_like(scores[:, 0], torch.inf)
    best, places = scores.topk(2, dim=-1) if scores.shape[-1] <= FLAT_VOCABULARY else top_k(scores, 2)
    return places[:, 0], best[:, 0] - best[:, 1]


Choice = Callable[[Tensor], tuple[Tensor, Tensor | None]]
Drawn = tuple[Tensor, Tensor | None, Tensor]  # tokens, lead and largest scaled logit, each (rows,)


def _sample(logits: Tensor, keys: Tensor, position: Tensor, config: SamplingConfig, choose: Choice) -> Drawn:
    if config.temperature == 0:
        tokens, lead = choose(logits)
        best = logits.gather(-1, tokens[:, None])[:, 0]
        return _checked(tokens, best), lead, best
    if config.top_k == 0 and config.top_p == 1:
        return _sample_all(_scaled(logits, config), keys, position, config, choose)
    support, token_ids = _truncate(logits, config)
    best = support[:, 0]
    support = _above_min_p(support, best[:, None], config)
    choice, lead = choose(gumbel(keys, position, token_ids).add_(support))
    return _checked(token_ids.gather(-1, choice[:, None])[:, 0], best), lead, best


def _sample_all(scaled: Tensor, keys: Tensor, position: Tensor, config: SamplingConfig, choose: Choice) -> Drawn:
    best = scaled.amax(dim=-1, keepdim=True)
    scaled = _above_min_p(scaled, best, config)
    n_rows, n_vocabulary = scaled.shape
    if n_vocabulary <= FLAT_VOCABULARY:
        tokens, lead = choose(gumbel(keys, position, n_vocabulary).add_(scaled))
        return _checked(tokens, best[:, 0]), lead, best[:, 0]
    # The best of perturbed logits is distributed as one perturbed log-sum-exp, so a block can be drawn before its
    # token: one noise per block instead of one per token.
    n_blocks = -(-n_vocabulary // BLOCK_TOKENS)
    padding = n_blocks * BLOCK_TOKENS - n_vocabulary
    if padding:
        scaled = torch.nn.functional.pad(scaled, (0, padding), value=-torch.inf)
    folded = scaled.view(n_rows, BLOCK_TOKENS, n_blocks)  # block j has tokens j, j + n_blocks, ...
    mass = (folded - best[:, None]).exp_().sum(dim=1)
    block, block_lead = choose(gumbel(keys ^ _BLOCK_STREAM, position, n_blocks).add_(mass.log_()))
    within = torch.arange(BLOCK_TOKENS, device=scaled.device)
    token_ids = block[:, None] + within * n_blocks
    chosen, lead = choose(gumbel(keys, position, token_ids).add_(scaled.gather(-1, token_ids)))
    if lead is not None and block_lead is not None:
        lead = torch.minimum(lead, block_lead)
    return _checked(token_ids.gather(-1, chosen[:, None])[:, 0], best[:, 0]), lead, best[:, 0]


def _truncate(logits: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """The kept logits, scaled, best first, and their token ids, both (rows, k); `-inf` marks what top_p removed.

    top_k acts first; top_p keeps the smallest set of most likely tokens whose probability reaches it, and the
    tokens that tie with its last.
    """
    n_vocabulary = logits.shape[-1]
    if config.top_k:
        support, token_ids = top_k(logits, min(config.top_k, n_vocabulary))
        support = _scaled(support, config)
        if config.top_p == 1:
            return support, token_ids
        lowest = _lowest_kept(support, support.logsumexp(dim=-1, keepdim=True), config.top_p)
        return support.masked_fill(support < lowest, -torch.inf), token_ids
    scaled = _scaled(logits, config)
    total = scaled.logsumexp(dim=-1, keepdim=True)
    # A short head holds the kept tokens of almost every row: sorting the whole vocabulary is the exception.
    support, token_ids = top_k(scaled, min(HEAD_TOKENS, n_vocabulary))
    lowest = _lowest_kept(support, total, config.top_p)
    if support.shape[-1] < n_vocabulary and (logits.is_cuda or bool((lowest == support[:, -1:]).any())):
        support, token_ids = scaled.sort(dim=-1, descending=True)
        lowest = _lowest_kept(support, total, config.top_p)
    return support.masked_fill(support < lowest, -torch.inf), token_ids


def _scaled(logits: Tensor, config: SamplingConfig) -> Tensor:
    return _floating(logits) if config.temperature == 1 else _floating(logits) / config.temperature


def _floating(logits: Tensor) -> Tensor:
    # Half precision is left first: most operations on it are several times slower on a CPU.
    return logits if logits.dtype == torch.float64 else logits.float()


def _above_min_p(scaled: Tensor, best: Tensor, config: SamplingConfig) -> Tensor:
    """Without the tokens whose probability is below min_p times that of the most likely one (arXiv 2407.01082)."""
    if config.min_p == 0:
        return scaled
    return scaled.masked_fill(scaled < best + math.log(config.min_p), -torch.inf)


def _checked(tokens: Tensor, best: Tensor) -> Tensor:
    # Marked, not raised: asking the device for one number per token would make it wait.
    return tokens.masked_fill(~best.isfinite(), -1)


def _lowest_kept(support: Tensor, total: Tensor, top_p: float) -> Tensor:
    """The smallest logit that top_p keeps, (rows, 1); support is sorted, total is the log of the whole mass."""
    probabilities = (support - total).exp()
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the tokens above
    n_kept = (before < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
    return support.gather(-1, n_kept - 1)
