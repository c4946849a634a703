"""What an export costs in perplexity: the model with its weights as stored, computing what is predicted alone."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtime.edge.budget import RunSettings
from runtime.edge.bundle import open_bundle
from runtime.edge.engine import EdgeModel
from runtime.edge.network import ffn_layers
from runtime.edge.quantise import DEFAULT_GROUP, FLOATS, dequantise, quantise
from runtime.edge.records import LayerPredictor, WeightFormat
from runtime.edge.sparse import sparse
from runtime.edge.text import TokenBatch, logits_of, perplexity

ENGINE_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexities of held-out text: of the model, with its weights as stored, and with predicted neurons alone."""

    model: float
    stored: float
    exported: float
    n_tokens: int

    @property
    def delta(self) -> float:
        """By which part of itself perplexity rises."""
        return self.exported / self.model - 1


def quality(
    model: PreTrainedModel,
    stored: PreTrainedModel,
    sparsity: tuple[Sequence[LayerPredictor], Sequence[float]],
    text: Sequence[TokenBatch],
) -> Quality:
    """`stored` is `as_stored(model)`; sparsity: predictors and thresholds."""
    n_tokens = sum(int(batch.is_asked.sum()) for batch in text)
    own, other = perplexity(logits_of(model), text), perplexity(logits_of(stored), text)
    return Quality(own, other, sparse_perplexity(stored, sparsity, text), n_tokens)


def sparse_perplexity(
    model: PreTrainedModel, sparsity: tuple[Sequence[LayerPredictor], Sequence[float]], text: Sequence[TokenBatch]
) -> float:
    """Of a model that computes what is predicted, and what is above its threshold, alone."""
    with sparse(model, *sparsity):
        return perplexity(logits_of(model), text)


def engine_delta(folder: Path, model: PreTrainedModel, text: Sequence[TokenBatch]) -> float:
    """By which part perplexity rises when our own runtime computes a written bundle, as it does when it decodes.

    It takes texts one by one, so the first ENGINE_TOKENS tokens' worth of them are asked. Its results do not depend on
    the memory it has.
    """
    rows = list(_first(text, ENGINE_TOKENS))
    settings = RunSettings(max_tokens=max(row.token_ids.shape[1] for row in rows))
    with EdgeModel(open_bundle(folder), None, settings) as engine:
        found = perplexity(lambda token_ids: engine.forward(token_ids[0].tolist())[None], rows)
    return found / perplexity(logits_of(model), rows) - 1


def _first(text: Sequence[TokenBatch], n_tokens: int) -> Iterator[TokenBatch]:
    """Texts on their own, without padding."""
    for batch in text:
        for ids, mask, is_asked in zip(batch.token_ids, batch.mask, batch.is_asked, strict=True):
            if n_tokens <= 0:
                return
            n_tokens -= int(mask.sum())
            yield TokenBatch(ids[mask][None], mask[mask][None], is_asked[mask][None])


@torch.no_grad()
def as_stored(model: PreTrainedModel, format: WeightFormat, group: int = DEFAULT_GROUP) -> PreTrainedModel:
    """A float32 copy whose numbers are those that a bundle keeps: neurons in `format`, the rest at least bfloat16."""
    found = cast(PreTrainedModel, copy.deepcopy(model).to(torch.float32))  # type: ignore[arg-type]
    resident = FLOATS.get(format, torch.bfloat16)
    for parameter in found.parameters():
        parameter.copy_(parameter.to(resident))
    for own, original in zip(ffn_layers(found), ffn_layers(model), strict=True):
        for part in ("gate", "up", "down"):
            weight = dequantise(quantise(original.weight(part), format, group))
            _put(getattr(cast(Any, own.mlp), f"{part}_proj"), weight.T if part == "down" else weight)
    return found


def _put(layer: nn.Linear, weight: Tensor) -> None:
    layer.weight.copy_(weight)
