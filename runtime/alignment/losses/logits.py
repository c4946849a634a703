"""Log-probabilities of answers from logits that are all there; the reference for the ones computed in chunks."""

import torch
from torch import Tensor


def answer_logps(logits: Tensor, token_ids: Tensor, is_answer: Tensor) -> Tensor:
    """S of every row, in float32 at least. logits (rows, T, V); token_ids and is_answer (rows, T)."""
    scores = logits[:, :-1]
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    targets = token_ids[:, 1:]
    logps = scores.gather(-1, targets[..., None]).squeeze(-1) - scores.logsumexp(dim=-1)  # (rows, T - 1)
    return torch.where(is_answer[:, 1:], logps, 0.0).sum(dim=-1)
