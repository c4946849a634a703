"""The weights of a model as GGUF tensors: names, ggml's order of rotary rows, neurons in a given order, ReLU folded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from runtime.edge.network import FfnLayer, ffn_layers, shape_of
from runtime.edge.records import LayerPlacement, LayerPredictor

Named = tuple[str, NDArray[np.float32]]
# silu(k g) (u / k) is relu(g) u up to 0.28 / k |u|. The 1 / k is shared by up and down, so that neither gets tiny.
FOLD = 1024.0


@dataclass(frozen=True, slots=True)
class Sparsity:
    """What PowerInfer's files have beside the weights."""

    predictors: Sequence[LayerPredictor]
    placements: Sequence[LayerPlacement]


def tensors(model: PreTrainedModel, sparsity: Sparsity | None) -> Iterator[Named]:
    """All of them; with `sparsity` as PowerInfer names them, without it as everyone else does."""
    inner, config = cast(Any, model).model, cast(Any, model.config)
    yield "token_embd.weight", _array(inner.embed_tokens.weight)
    for index, block in enumerate(inner.layers):
        prefix, attention = f"blk.{index}.", block.self_attn
        yield f"{prefix}attn_norm.weight", _array(block.input_layernorm.weight)
        for name in ("q", "k", "v"):
            heads = config.num_attention_heads if name == "q" else config.num_key_value_heads
            for kind, value in getattr(attention, f"{name}_proj").named_parameters():
                is_rotary = name != "v" and config.model_type in ("llama", "mistral")
                yield f"{prefix}attn_{name}.{kind}", _array(_interleaved(value, heads) if is_rotary else value)
        for name in ("q_norm", "k_norm"):
            if hasattr(attention, name):
                yield f"{prefix}attn_{name}.weight", _array(getattr(attention, name).weight)
        yield f"{prefix}attn_output.weight", _array(attention.o_proj.weight)
        yield f"{prefix}ffn_norm.weight", _array(block.post_attention_layernorm.weight)
        layer = ffn_layers(model)[index]
        if sparsity is None:
            yield from _dense(prefix, layer, shape_of(model).activation == "relu")
        else:
            yield from _sparse(prefix, layer, sparsity.predictors[index], sparsity.placements[index])
    yield "output_norm.weight", _array(inner.norm.weight)
    if sparsity is not None or not config.tie_word_embeddings:
        yield "output.weight", _array(cast(Any, model).lm_head.weight)


def _dense(prefix: str, layer: FfnLayer, is_relu: bool) -> Iterator[Named]:
    factor = FOLD if is_relu else 1.0
    yield f"{prefix}ffn_gate.weight", _array(layer.weight("gate") * factor)
    yield f"{prefix}ffn_up.weight", _array(layer.weight("up") / factor**0.5)
    yield f"{prefix}ffn_down.weight", _array(layer.weight("down").T / factor**0.5)


def _sparse(prefix: str, layer: FfnLayer, predictor: LayerPredictor, placement: LayerPlacement) -> Iterator[Named]:
    order = torch.from_numpy(placement.order)
    yield f"{prefix}ffn_gate.weight", _array(layer.weight("gate")[order])
    yield f"{prefix}ffn_up.weight", _array(layer.weight("up")[order])
    yield f"{prefix}ffn_down_t.weight", _array(layer.weight("down")[order])
    yield f"{prefix}fc1.weight", _array(predictor.fc1)
    yield f"{prefix}fc2.weight", _array(predictor.fc2[order])


def _interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of a head as ggml rotates them: neighbours, where transformers pairs the halves."""
    halves = weight.detach().reshape(n_heads, 2, weight.shape[0] // n_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _array(weight: Tensor) -> NDArray[np.float32]:
    return weight.detach().to(torch.float32).cpu().contiguous().numpy()
