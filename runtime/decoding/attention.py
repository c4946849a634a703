"""How transformers models attend into the arena: one function registered as attention implementation `winnow`.

A model call that carries the extra argument `arena_pass` reads and writes the arena; any other call of the same
model (training, scoring, `generate`) is plain scaled dot product attention.
"""

from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from runtime.decoding.arena import Arena
from runtime.errors import ModelError

NAME = "winnow"
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
# Their rotation depends on the longest row of the batch, so a candidate would depend on its neighbours.
_UNSTABLE_ROPE = ("dynamic", "longrope")


class ArenaPass(Protocol):
    """What one model call does with the arena in each layer."""

    mask: Tensor  # 4-D, so that transformers passes it on instead of building one

    def attend(self, layer: int, query: Tensor, new: tuple[Tensor, Tensor], scaling: float) -> Tensor:
        """Store the new keys and values, then attend; query (rows, heads, tokens, head_dim), same shape out."""
        ...


class PrefillPass:
    """Some prompts, padded on the right: each is computed once and stored in all of its n rows."""

    def __init__(self, arena: Arena, rows: slice, n_prompts: int) -> None:
        self.arena, self.rows, self.n_prompts = arena, rows, n_prompts
        # Unused: the attention below is causal by itself, and what follows a prompt is hidden by its length.
        self.mask = arena.memory.new_zeros(1, 1, 1, 1)

    def attend(self, layer: int, query: Tensor, new: tuple[Tensor, Tensor], scaling: float) -> Tensor:
        """See ArenaPass; query has one row per prompt."""
        key, value = new
        self._store(self.arena.keys(layer), key)
        self._store(self.arena.values(layer), value)
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)

    def _store(self, memory: Tensor, new: Tensor) -> None:
        stored = memory[self.rows, :, : new.shape[2]]
        stored.view(self.n_prompts, -1, *new.shape[1:]).copy_(new[:, None])  # (prompts, n, kv_heads, tokens, head_dim)


class StepPass:
    """One token for each of the live rows, at its own position."""

    def __init__(self, arena: Arena, lengths: Tensor) -> None:
        """lengths: int64 (live rows,), tokens already stored per row; the new token goes to that slot."""
        self.arena, self.lengths = arena, lengths
        self.n_slots = int(lengths.max()) + 1
        self.row_index = torch.arange(len(lengths), device=lengths.device)
        slots = torch.arange(self.n_slots, device=lengths.device)
        hidden = slots[None, :] > lengths[:, None]  # (rows, slots)
        mask = torch.zeros(hidden.shape, dtype=arena.memory.dtype, device=lengths.device)
        self.mask = mask.masked_fill_(hidden, -torch.inf)[:, None, None, :]

    def attend(self, layer: int, query: Tensor, new: tuple[Tensor, Tensor], scaling: float) -> Tensor:
        """See ArenaPass; query has one token per row."""
        n_rows, n_heads, _, head_dim = query.shape
        keys, values = self.arena.keys(layer), self.arena.values(layer)
        keys[self.row_index, :, self.lengths] = new[0][:, :, 0]
        values[self.row_index, :, self.lengths] = new[1][:, :, 0]
        # The query heads of one key-value head act as its query tokens: no key or value is repeated in memory.
        grouped = query.reshape(n_rows, keys.shape[1], -1, head_dim)
        attended = scaled_dot_product_attention(
            grouped, keys[:n_rows, :, : self.n_slots], values[:n_rows, :, : self.n_slots], self.mask, scale=scaling
        )
        return attended.reshape(n_rows, n_heads, 1, head_dim)


def arena_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function that transformers calls in every layer."""
    arena_pass = cast(ArenaPass | None, options.pop("arena_pass", None))
    if arena_pass is None:
        output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, weights
    layer = cast(int, module.layer_idx)
    attended = arena_pass.attend(layer, query, (key, value), cast(float, options["scaling"]))
    return attended.transpose(1, 2), None


def install(model: PreTrainedModel) -> None:
    """Make `model` attend through this module; refuse architectures that it would decode wrongly."""
    check_supported(model.config)
    AttentionInterface.register(NAME, arena_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def check_supported(config: PreTrainedConfig) -> None:
    """Raise ModelError unless the architecture is plain full attention."""
    kind = config.model_type
    if kind not in SUPPORTED:
        raise ModelError(f"model type {kind!r} is not supported for decoding; use one of {', '.join(SUPPORTED)}")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            raise ModelError(f"{name} = {getattr(config, name)} is not supported for decoding; use a model without it")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in _UNSTABLE_ROPE:
        raise ModelError(f"rope type {rope!r} is not supported for decoding; use a model with plain rotary positions")


def check_window(config: PreTrainedConfig, n_slots: int) -> None:
    """Raise ModelError when a sliding window would hide tokens of a row of `n_slots` tokens."""
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    slides = window is not None and (layers is None or "sliding_attention" in layers)
    if slides and cast(int, window) < n_slots:
        raise ModelError(
            f"sliding window of {window} tokens is below prompt + max_new_tokens = {n_slots}; "
            "use shorter prompts, a lower max_new_tokens or a model without sliding window"
        )
