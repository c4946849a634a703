"""How one token attends in a bundle: by the compiled loops; several at once as transformers would."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from runtime.edge.native import as_numbers

NAME = "winnow_edge"


def use_attention(model: PreTrainedModel) -> None:
    """Let the attention of one token go through the compiled loops."""
    AttentionInterface.register(NAME, _attention)
    model.config._attn_implementation = NAME


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    """query (1, heads, new, d), key and value (1, shared heads, all, d) -> (1, new, heads, d), as transformers asks."""
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)
    from runtime.edge import native_kernels

    queries = (query[0, :, 0].float() * rest["scaling"]).numpy()
    keys, values = as_numbers(key), as_numbers(value)
    out = np.empty_like(queries)
    n_each = len(queries) // keys.shape[1]
    for head in range(keys.shape[1]):
        heads = slice(head * n_each, (head + 1) * n_each)
        native_kernels.attend(queries[heads], keys[0, head], values[0, head], out[heads])
    return torch.from_numpy(out).to(query.dtype)[None, None], None
