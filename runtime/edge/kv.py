"""Keys and values of one conversation in memory of a fixed size."""

import torch
from torch import Tensor
from transformers import PreTrainedConfig


class FixedKV:
    """What an attention layer of transformers calls its cache; room for `n_most` tokens, taken once."""

    def __init__(self, config: PreTrainedConfig, n_most: int, dtype: torch.dtype) -> None:
        self.n_most, self.n_tokens = n_most, 0
        self.memory = torch.zeros(kv_shape(config, n_most), dtype=dtype)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *rest: object) -> tuple[Tensor, Tensor]:
        """Store those of new tokens (1, heads, new, head_dim); those of all tokens so far."""
        end = self.n_tokens + key.shape[2]
        assert end <= self.n_most
        keys, values = self.memory[layer_idx]
        keys[:, self.n_tokens : end] = key[0]
        values[:, self.n_tokens : end] = value[0]
        return keys[None, :, :end], values[None, :, :end]


def kv_shape(config: PreTrainedConfig, n_most: int) -> tuple[int, ...]:
    """(layers, 2, kv heads, tokens, head_dim)."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (config.num_hidden_layers, 2, config.num_key_value_heads, n_most, head_dim)
