"""What feed-forward layers are fed over calibration text: a second moment and a bounded sample of tokens per layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from runtime.edge.network import shape_of
from runtime.edge.profile import read, sampled
from runtime.edge.text import TokenBatch


@dataclass(frozen=True, slots=True)
class Residuals:
    """Of one layer, each divided by its root mean square as the norm does.

    samples: (n, H) in random order. moment: (H, H) over all tokens.
    """

    samples: Tensor
    moment: Tensor


@torch.inference_mode()
def residuals(model: PreTrainedModel, text: Sequence[TokenBatch], n_samples: int, seed: int) -> list[Residuals]:
    """Of every layer, in one pass."""
    shape, epsilon = shape_of(model), float(cast(Any, model.config).rms_norm_eps)
    moments = torch.zeros(shape.n_layers, shape.hidden, shape.hidden)
    kept: list[list[Tensor]] = [[] for _ in range(shape.n_layers)]
    n_tokens, n_seen = sum(int(batch.mask.sum()) for batch in text), [0] * shape.n_layers
    chosen = torch.from_numpy(sampled(n_tokens, n_samples, seed))

    def add(index: int, residual: Tensor, gate: Tensor) -> None:
        wide = residual.float().cpu()
        scaled = wide * (wide.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt()
        moments[index] += scaled.T @ scaled / n_tokens
        start, end = n_seen[index], n_seen[index] + len(scaled)
        kept[index].append(scaled[chosen[(chosen >= start) & (chosen < end)] - start])
        n_seen[index] = end

    read(model, text, add)
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
    return [Residuals(torch.cat(parts)[order], moment) for parts, moment in zip(kept, moments, strict=True)]
