"""How transformers models attend into the arena: a function registered as attention implementation `winnow`.

A model call that carries the extra argument `arena_pass` reads and writes the arena; any other call of the same
model (training, scoring, `generate`) is the attention that transformers would choose itself.
"""

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

from runtime.errors import ModelError

NAME = "winnow"
NAME_SOFTCAP = "winnow_softcap"  # outside the arena, capped scores need a mask that is always there
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
# Their rotation depends on the longest row of the batch, so a candidate would depend on its neighbours.
_UNSTABLE_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer turns queries and keys into weights."""

    scaling: float
    window: int | None = None  # a token sees itself and the window - 1 tokens before it
    softcap: float | None = None

    def of(self, scaled: Tensor, key: Tensor) -> Tensor:
        """Scaled queries (..., queries, head_dim) and keys (..., keys, head_dim) -> (..., queries, keys), capped but
        not masked."""
        scores = torch.matmul(scaled, key.transpose(-1, -2))
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap


class ArenaPass(Protocol):
    """What one model call does with the arena in each layer."""

    def attend(self, layer: int, query: Tensor, new: tuple[Tensor, Tensor], scores: Scores) -> Tensor:
        """Store the new keys and values, then attend; query (batch, heads, tokens, head_dim), same shape out."""
        ...


def causal_attention(query: Tensor, new: tuple[Tensor, Tensor], scores: Scores) -> Tensor:
    """Attention of whole sequences to themselves; query (batch, heads, tokens, head_dim), same shape out."""
    key, value = new
    n_tokens = query.shape[2]
    is_narrow = scores.window is not None and scores.window < n_tokens
    if scores.softcap is None and not is_narrow:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scores.scaling, enable_gqa=True)
    place = torch.arange(n_tokens, device=query.device)
    distance = place[:, None] - place[None]
    is_hidden = (distance < 0) | (distance >= (scores.window or n_tokens))
    mask = torch.zeros(is_hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(is_hidden, -torch.inf)
    if scores.softcap is None:
        return scaled_dot_product_attention(query, key, value, mask, scale=scores.scaling, enable_gqa=True)
    return _softcapped(query, new, mask, scores)


def _softcapped(query: Tensor, new: tuple[Tensor, Tensor], mask: Tensor, scores: Scores) -> Tensor:
    key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in new)
    weights = torch.softmax(scores.of(query * scores.scaling, key) + mask, dim=-1)
    return torch.matmul(weights, value)


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
    scores = Scores(cast(float, options["scaling"]), options.get("sliding_window"), options.get("softcap"))
    if arena_pass is not None:
        attended = arena_pass.attend(cast(int, module.layer_idx), query, (key, value), scores)
        return attended.transpose(1, 2), None
    if scores.softcap is not None:
        assert attention_mask is not None
        return _softcapped(query, (key, value), attention_mask, scores).transpose(1, 2), None
    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return output, weights


def run(model: PreTrainedModel, token_ids: Tensor, positions: Tensor, arena_pass: ArenaPass) -> Tensor:
    """Last hidden states (batch, tokens, width) of token ids and positions (batch, tokens)."""
    # Passed on as it is because it has four dimensions; the pass masks by itself.
    no_mask = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=token_ids.device)
    output = model.base_model(
        input_ids=token_ids, position_ids=positions, attention_mask=no_mask, use_cache=False, arena_pass=arena_pass
    )
    return cast(Tensor, output.last_hidden_state)


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(rows, width) -> (rows, vocabulary), for every supported architecture one linear layer and perhaps a cap."""
    logits: Tensor = model.get_output_embeddings()(hidden)  # type: ignore[no-untyped-call]
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def install(model: PreTrainedModel) -> None:
    """Make `model` attend through this module; refuse architectures that it would decode wrongly."""
    check_supported(model.config)
    AttentionInterface.register(NAME, arena_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    AttentionInterface.register(NAME_SOFTCAP, arena_attention)
    AttentionMaskInterface.register(NAME_SOFTCAP, eager_mask)
    has_softcap = getattr(model.config, "attn_logit_softcapping", None) is not None
    model.set_attn_implementation(NAME_SOFTCAP if has_softcap else NAME)


def is_supported(model: PreTrainedModel) -> bool:
    """Whether `install` takes the model."""
    try:
        check_supported(model.config)
    except ModelError:
        return False
    return True


def check_supported(config: PreTrainedConfig) -> None:
    """Raise ModelError for an architecture that the arena would decode wrongly."""
    kind = config.model_type
    if kind not in SUPPORTED:
        raise ModelError(f"model type {kind!r} is not supported for decoding; use one of {', '.join(SUPPORTED)}")
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelError(f"{kind} with bidirectional attention cannot decode; use a causal model")
    for rope in _ropes(config):
        if rope in _UNSTABLE_ROPE:
            raise ModelError(f"rope type {rope!r} is not supported for decoding; use a model with a fixed rotation")


def _ropes(config: PreTrainedConfig) -> list[str]:
    parameters = getattr(config, "rope_parameters", None) or {}
    per_layer_type = [one for one in parameters.values() if isinstance(one, dict)]
    return [one.get("rope_type", "default") for one in [parameters, *per_layer_type]]
