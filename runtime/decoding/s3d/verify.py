"""Which tokens are drafted, and which of them stay: the two acceptance rules, each exactly lossless.

coupled (arXiv 2408.07978): draft and target are sampled with the same noise, and a draft stays while both are equal.
What stays is the target's own sample, so that the text is the same whatever is drafted. classic (arXiv 2211.17192): a
draft x of law q stays with probability min(1, p(x) / q(x)); the first that does not is drawn anew from what p has above
q. Its text has the law of p, but depends on what was drafted. Greedy decoding is coupled by either name.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from runtime.decoding.sampling import SamplingConfig, log_probabilities, penalise, sample, sample_with_lead
from runtime.randomness import gumbel, uniform

RuleName = Literal["coupled", "classic"]
# Place in the block and the tokens (rows,) drafted before it, none for the first -> logits (rows, vocabulary).
LogitsAfter = Callable[[int, Tensor | None], Tensor]
# Keep the noise of drafts, acceptance and corrections apart from that of plain sampling.
_DRAFT_STREAM = 0x2545F4914F6CDD1D
_ACCEPT_STREAM = 0x369DEA0F31A53F85
_CORRECTION_STREAM = 0x1D8E4E27C47D124F


@dataclass(frozen=True, slots=True)
class Block:
    """The rows of one round: where their noise comes from and how far they may go."""

    keys: Tensor  # (rows,)
    start: Tensor  # (rows,), tokens sampled so far, and so the position of the first draft
    limits: Tensor  # (rows,), tokens that a row may get
    seen: Tensor | None  # (rows, vocabulary), where seen tokens matter
    sampling: SamplingConfig
    with_lead: bool = False  # whether somebody asks how close the draws were

    def positions(self, n: int) -> Tensor:
        """Of the next n tokens, (rows, n)."""
        return self.start[:, None] + torch.arange(n, device=self.start.device)


@dataclass(frozen=True, slots=True)
class Drafts:
    """Drafted tokens (rows, k), and the penalised logits they come from, (rows, k, vocabulary)."""

    tokens: Tensor
    logits: Tensor


@dataclass(frozen=True, slots=True)
class Verdict:
    """The next tokens (rows, 1 + k), of which the first `counts` (rows,) are kept; `accepted` (rows,) were drafted.

    lead: (rows, 1 + k) of `sample_with_lead`; None where nobody asks or tokens depend on what was drafted anyway.
    """

    tokens: Tensor
    counts: Tensor
    accepted: Tensor
    lead: Tensor | None


def draft(block: Block, logits: Tensor, rule: RuleName) -> Drafts:
    """Sample from the draft pass's logits (rows, k, vocabulary)."""
    k = logits.shape[1]
    if block.seen is not None:
        return draft_in_turn(block, k, lambda place, _: logits[:, place], rule)
    return Drafts(_sample(logits, _draft_keys(block, rule), block.positions(k), block.sampling), logits)


def draft_in_turn(block: Block, k: int, logits_after: LogitsAfter, rule: RuleName) -> Drafts:
    """Likewise where a draft depends on those before it: by a repetition penalty, or a sampler head."""
    keys, positions = _draft_keys(block, rule), block.positions(k)
    seen = None if block.seen is None else block.seen.clone()
    tokens: list[Tensor] = []
    laws: list[Tensor] = []
    for place in range(k):
        logits = logits_after(place, tokens[-1] if tokens else None)
        if seen is not None:
            logits = penalise(logits, seen, block.sampling.repetition_penalty)
        laws.append(logits)
        tokens.append(sample(logits, keys, positions[:, place], block.sampling))
        if seen is not None:
            seen.scatter_(1, tokens[-1].clamp(min=0)[:, None], True)
    return Drafts(torch.stack(tokens, 1), torch.stack(laws, 1))


def verify(block: Block, drafts: Drafts | None, logits: Tensor, rule: RuleName) -> Verdict:
    """Judge drafts by the logits (rows, 1 + k, vocabulary) of the full pass; None where nothing was drafted."""
    if block.seen is not None:
        logits = _penalised(block.seen, drafts, logits, block.sampling.repetition_penalty)
    if drafts is not None and is_classic(rule, block.sampling):
        return _classic(block, drafts, logits)
    tokens, lead = _target(logits, block)
    if drafts is None:
        return Verdict(tokens, block.limits.clamp(max=1), torch.zeros_like(block.limits), lead)
    return replace(_verdict(block, tokens, drafts.tokens == tokens[:, :-1]), lead=lead)


def is_classic(rule: RuleName, sampling: SamplingConfig) -> bool:
    """Whether the classic rule is at work."""
    return rule == "classic" and sampling.temperature > 0


def acceptance(p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
    """Probability to keep each token, (...), under the laws p and q, (..., vocabulary)."""
    at = tokens.clamp(min=0)[..., None]
    return (p.gather(-1, at) / q.gather(-1, at)).squeeze(-1)


def correction(p: Tensor, q: Tensor) -> Tensor:
    """Unnormalised law (..., vocabulary) of the token in place of one that was not kept."""
    above = (p - q).clamp_(min=0)
    # Equal laws keep everything; what rounding still rejects is drawn from p.
    return torch.where(above.sum(dim=-1, keepdim=True) > 0, above, p)


def _classic(block: Block, drafts: Drafts, logits: Tensor) -> Verdict:
    n_rows, k = drafts.tokens.shape
    p = log_probabilities(logits.flatten(0, 1), block.sampling).exp_().view(n_rows, k + 1, -1)
    q = log_probabilities(drafts.logits.flatten(0, 1), block.sampling).exp_().view(n_rows, k, -1)
    chance = acceptance(p[:, :k], q, drafts.tokens)
    keys = (block.keys ^ _ACCEPT_STREAM).repeat_interleave(k)
    drawn = uniform(keys, block.positions(k).flatten(), 1).view(n_rows, k)
    verdict = _verdict(block, drafts.tokens, (drawn < chance) & (drafts.tokens >= 0))
    # One more token behind the accepted ones: drawn anew where a draft was refused, else a further one.
    last, row = verdict.accepted, torch.arange(n_rows, device=p.device)
    was_refused = last < block.limits.clamp(max=k + 1) - 1
    law = torch.where(was_refused[:, None], correction(p[row, last], q[row, last.clamp(max=k - 1)]), p[row, last])
    noise = gumbel(block.keys ^ _CORRECTION_STREAM, block.start + last, law.shape[-1])
    extra = (law.log() + noise).argmax(dim=-1)
    is_broken = ~logits[row, last].amax(dim=-1).isfinite()
    tokens = torch.cat((drafts.tokens, drafts.tokens[:, :1]), dim=1)
    tokens[row, last] = extra.masked_fill(is_broken, -1)
    return replace(verdict, tokens=tokens)


def _verdict(block: Block, tokens: Tensor, is_good: Tensor) -> Verdict:
    """Keep drafts up to the first bad one or the row's limit, and one token behind them."""
    within = torch.arange(is_good.shape[1], device=tokens.device) < block.limits[:, None] - 1
    accepted = (is_good & within).long().cumprod(dim=1).sum(dim=1)
    return Verdict(tokens, torch.minimum(accepted + 1, block.limits), accepted, None)


def _penalised(seen: Tensor, drafts: Drafts | None, logits: Tensor, penalty: float) -> Tensor:
    """Each place has seen the drafts before it."""
    seen, places = seen.clone(), [penalise(logits[:, 0], seen, penalty)]
    for place in range(1, logits.shape[1]):
        assert drafts is not None
        seen.scatter_(1, drafts.tokens[:, place - 1].clamp(min=0)[:, None], True)
        places.append(penalise(logits[:, place], seen, penalty))
    return torch.stack(places, 1)


def _draft_keys(block: Block, rule: RuleName) -> Tensor:
    return block.keys ^ _DRAFT_STREAM if is_classic(rule, block.sampling) else block.keys


def _target(logits: Tensor, block: Block) -> tuple[Tensor, Tensor | None]:
    """The policy's own tokens, and their leads where somebody asks, (rows, tokens) each."""
    n_each = logits.shape[1]
    if not block.with_lead:
        return _sample(logits, block.keys, block.positions(n_each), block.sampling), None
    keys, positions = block.keys.repeat_interleave(n_each), block.positions(n_each).flatten()
    tokens, lead = sample_with_lead(logits.flatten(0, 1), keys, positions, block.sampling)
    return tokens.view(-1, n_each), lead.view(-1, n_each)


def _sample(logits: Tensor, keys: Tensor, positions: Tensor, sampling: SamplingConfig) -> Tensor:
    n_each = logits.shape[1]
    flat = sample(logits.flatten(0, 1), keys.repeat_interleave(n_each), positions.flatten(), sampling)
    return flat.view(-1, n_each)
