"""A written GGUF file as a model again, with the numbers that its clients compute with: for measuring what it costs."""

import copy
import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from runtime.edge.gguf_lint import open_gguf
from runtime.edge.records import LayerPredictor
from runtime.models import quiet

PARTS = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down_t": "down_proj"}


def dense_model(path: Path) -> PreTrainedModel:
    """A plain file, read by transformers' own loader."""
    with quiet(), redirect_stderr(io.StringIO()):  # its bar is not one of those that can be switched off
        found = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
    return cast(PreTrainedModel, found)


@torch.no_grad()
def sparse_model(path: Path, model: PreTrainedModel) -> tuple[PreTrainedModel, list[LayerPredictor]]:
    """PowerInfer's file: a copy of `model` with the file's numbers, neurons in the file's order, and its predictors."""
    tensors = _tensors(path)
    found = cast(Any, copy.deepcopy(model).to(torch.float32))  # type: ignore[arg-type]
    config, predictors = found.config, []
    if config.tie_word_embeddings:
        found.lm_head.weight = torch.nn.Parameter(found.lm_head.weight.clone())
    own = {"token_embd": found.model.embed_tokens, "output_norm": found.model.norm, "output": found.lm_head}
    for index, block in enumerate(found.model.layers):
        prefix, attention = f"blk.{index}.", block.self_attn
        own |= {f"{prefix}{name}": getattr(block.mlp, part) for name, part in PARTS.items()}
        own |= {f"{prefix}attn_{name}": getattr(attention, f"{name}_proj") for name in ("q", "k", "v")}
        own |= {f"{prefix}attn_output": attention.o_proj, f"{prefix}attn_norm": block.input_layernorm}
        own[f"{prefix}ffn_norm"] = block.post_attention_layernorm
        fc1, fc2 = (tensors.pop(f"{prefix}{name}") for name in ("fc1", "fc2"))
        predictors.append(LayerPredictor("low_rank", fc1, fc2))
    for name, module in own.items():
        module.weight.copy_(_as_ours(name, tensors.pop(name), config))
    assert not tensors, sorted(tensors)
    return found, predictors


def _tensors(path: Path) -> dict[str, Tensor]:
    from gguf import quants

    return {
        tensor.name.removesuffix(".weight"): torch.from_numpy(
            np.copy(quants.dequantize(tensor.data, tensor.tensor_type))
        )
        for tensor in open_gguf(path).tensors
    }


def _as_ours(name: str, values: Tensor, config: Any) -> Tensor:
    if name.endswith("ffn_down_t"):
        return values.T
    if not name.endswith(("attn_q", "attn_k")):
        return values
    heads = config.num_attention_heads if name.endswith("q") else config.num_key_value_heads
    pairs = values.reshape(heads, len(values) // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(values.shape)
