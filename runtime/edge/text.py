"""Token ids to measure a model on, in batches of bounded size, and its perplexity on them."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from runtime.errors import InputError

Logits = Callable[[Tensor], Tensor]  # token ids (B, T) -> (B, T, V)


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids, of which the first `n_prompt` are given: how likely they are is not asked."""

    token_ids: Sequence[int]
    n_prompt: int = 1


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """token_ids: (B, T), padded on the right, where causal models do not look. mask: (B, T), true for real tokens.

    is_asked: (B, T), true for those whose likelihood counts.
    """

    token_ids: Tensor
    mask: Tensor
    is_asked: Tensor


def batches(texts: Sequence[Text], max_tokens: int = 1024) -> list[TokenBatch]:
    """Texts of like length together, at most `max_tokens` with their padding (a longer one is a batch of its own)."""
    usable = sorted((text for text in texts if len(text.token_ids) > max(text.n_prompt, 1)), key=_length)
    if not usable:
        raise InputError("no calibration text: no text has a token after its prompt, or there is none at all")
    parts: list[list[Text]] = [[]]
    for row in usable:
        if parts[-1] and (len(parts[-1]) + 1) * _length(row) > max_tokens:
            parts.append([])
        parts[-1].append(row)
    return [_batch(part) for part in parts]


@torch.inference_mode()
def perplexity(logits: Logits, text: Iterable[TokenBatch]) -> float:
    """exp of the mean negative log-likelihood of the tokens that are asked."""
    total, count = 0.0, 0
    for batch in text:
        logps = torch.log_softmax(logits(batch.token_ids)[:, :-1].float(), dim=-1)
        own = logps.gather(-1, batch.token_ids[:, 1:, None].to(logps.device)).squeeze(-1)
        mask = batch.is_asked[:, 1:].to(logps.device)
        total -= float(own.double()[mask].sum())
        count += int(mask.sum())
    return math.exp(total / count)


def logits_of(model: PreTrainedModel) -> Logits:
    """A transformers model as a function."""
    return lambda token_ids: model(input_ids=token_ids.to(model.device), use_cache=False).logits


def _length(text: Text) -> int:
    return len(text.token_ids)


def _batch(rows: Sequence[Text]) -> TokenBatch:
    width = max(map(_length, rows))
    token_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, is_asked = (torch.zeros(len(rows), width, dtype=torch.bool) for _ in range(2))
    for place, row in enumerate(rows):
        token_ids[place, : _length(row)] = torch.tensor(row.token_ids)
        mask[place, : _length(row)] = True
        is_asked[place, max(row.n_prompt, 1) : _length(row)] = True
    return TokenBatch(token_ids, mask, is_asked)
