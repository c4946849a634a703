"""Log-probabilities of answers by a model."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from runtime.alignment.collate import Batch
from runtime.alignment.losses import AnswerLogps
from runtime.alignment.losses.logits import answer_logps as from_logits


def answer_logps(model: nn.Module, batch: Batch, whole_sequence: bool = False) -> AnswerLogps:
    """Of all rows."""
    logits = _logits(model, batch)
    found, n_tokens = from_logits(logits, batch.token_ids, batch.is_answer), batch.is_answer.sum(-1)
    if not whole_sequence:
        return AnswerLogps(found, n_tokens)
    whole = from_logits(logits, batch.token_ids, batch.mask.bool())
    return AnswerLogps(found, n_tokens, None, whole, batch.mask.sum(-1) - 1)


def answer_logps_and_kl(
    model: nn.Module, reference: nn.Module | Callable[[], AbstractContextManager[object]], batch: Batch
) -> AnswerLogps:
    """Likewise, with the divergence from the reference."""
    with torch.no_grad():
        if isinstance(reference, nn.Module):
            before = _logits(reference, batch)
        else:
            with reference():
                before = _logits(model, batch)
    logits = _logits(model, batch)
    wanted, logps = before[:, :-1].log_softmax(-1), logits[:, :-1].log_softmax(-1)
    kl = torch.where(batch.is_answer[:, 1:], (wanted.exp() * (wanted - logps)).sum(-1), 0.0).sum(-1)
    return AnswerLogps(from_logits(logits, batch.token_ids, batch.is_answer), batch.is_answer.sum(-1), kl)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    inner = cast(Any, model.get_base_model() if hasattr(model, "get_base_model") else model)  # type: ignore[operator]
    hidden = inner.base_model(input_ids=batch.token_ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
    return cast(Tensor, inner.lm_head(hidden))
