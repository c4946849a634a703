"""The reward model's network before training: the frozen policy in a wider residual stream, with new layers on top.

A slip shows where a number differs from what the policy expected one token earlier. The policy knows that expectation
only in its last layers, and by then has forgotten which number came (linear probes of the last layer find the expected
number in 88 % of the cases, the number itself in 9 %). So the stream gets extra channels that carry each token past
the policy's layers, which neither read nor write them; the first new layer starts out comparing the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaAttention

# Small beside the embedding, so that the policy's normalisation hardly notices; made up for in the new layers.
IDENTITY_SCALE = 0.3


@dataclass(frozen=True, slots=True)
class _Shape:
    """Channels of the policy, channels that carry the token, and where the new layers start."""

    width: int
    extra: int
    n_old: int


def build_reward_network(
    policy: LlamaForCausalLM, n_new_layers: int, number_ids: list[int], sample: Tensor
) -> LlamaForSequenceClassification:
    """A one-label classifier that contains the policy; only its new layers, last norm and head require gradients.

    number_ids: the tokens worth telling apart. sample: token ids (rows, T) on which the stream's scale is measured.
    """
    old = policy.config
    head_dim = old.hidden_size // old.num_attention_heads
    shape = _Shape(old.hidden_size, cast(int, old.num_key_value_heads) * head_dim, old.num_hidden_layers)
    config = LlamaConfig(**(old.to_dict() | _wider(old, shape, n_new_layers)))
    model = LlamaForSequenceClassification(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        _copy_policy(model, policy, shape)
        basis, token_scale = _carry_tokens(model, policy, number_ids, shape)
        _rescale_norms(model, sample, token_scale, shape)
        new = model.model.layers[shape.n_old :]
        for projection in (p for layer in new for p in (layer.self_attn.o_proj, layer.mlp.down_proj)):
            projection.weight.zero_()  # at first a new layer changes nothing
            projection.weight.register_hook(_without_rows_from(shape.width))
        _compare_with_expectation(new[0].self_attn, basis * policy.model.norm.weight[:, None], shape)
    frozen = ("model.embed_tokens.", *(f"model.layers.{index}." for index in range(shape.n_old)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith(frozen)
    return model


def _wider(old: LlamaConfig, shape: _Shape, n_new_layers: int) -> dict[str, object]:
    return {
        "hidden_size": shape.width + shape.extra,
        "head_dim": old.hidden_size // old.num_attention_heads,
        "num_attention_heads": 2 * old.num_attention_heads,
        "num_key_value_heads": 2 * cast(int, old.num_key_value_heads),
        "num_hidden_layers": shape.n_old + n_new_layers,
        "num_labels": 1,
        "architectures": None,
    }


def _copy_policy(model: LlamaForSequenceClassification, policy: LlamaForCausalLM, shape: _Shape) -> None:
    """The policy's weights in one corner of each wide matrix, zeros elsewhere."""
    state = model.state_dict()
    for name, weight in policy.model.state_dict().items():
        wide = state[f"model.{name}"]
        if name.startswith("norm."):
            continue
        if weight.dim() == 2:
            wide.zero_()[: weight.shape[0], : weight.shape[1]] = weight
        else:  # a norm: its root mean square is taken over more channels now
            wide[: shape.width] = weight * math.sqrt(shape.width / len(wide))
    model.load_state_dict(state)


def _carry_tokens(
    model: LlamaForSequenceClassification, policy: LlamaForCausalLM, number_ids: list[int], shape: _Shape
) -> tuple[Tensor, Tensor]:
    """Write each token's unembedding into the extra channels of its embedding.

    Returns the orthonormal directions (width, extra) used, those in which the numbers' unembeddings vary most, and the
    root mean square of the numbers in the extra channels.
    """
    unembedding = policy.lm_head.weight
    centre = unembedding[number_ids].mean(dim=0)
    directions = torch.linalg.svd(unembedding[number_ids] - centre, full_matrices=False)[2]
    basis: Tensor = directions[: shape.extra].T
    identity = (unembedding - centre) @ basis
    unit = identity[number_ids].pow(2).mean().sqrt()
    scale = IDENTITY_SCALE * policy.model.embed_tokens.weight.std()
    model.model.embed_tokens.weight[:, shape.width :] = scale * identity / unit
    return basis, scale


def _rescale_norms(model: LlamaForSequenceClassification, sample: Tensor, token_scale: Tensor, shape: _Shape) -> None:
    """New layers see the policy's channels and the numbers' channels at the same scale."""
    hidden = model.model(input_ids=sample, use_cache=False, output_hidden_states=True).hidden_states[shape.n_old]
    policy_scale = hidden[..., : shape.width].pow(2).mean(dim=-1).sqrt().median()
    new = model.model.layers[shape.n_old :]
    norms = [norm for layer in new for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    for norm in (*norms, model.model.norm):
        norm.weight.fill_(math.sqrt(shape.width / (shape.width + shape.extra)))
        norm.weight[shape.width :] *= policy_scale / token_scale


def _compare_with_expectation(attention: LlamaAttention, directions: Tensor, shape: _Shape) -> None:
    """Half of the heads look for a token that expected this one: query = the token, key = the policy's expectation.

    Keys are turned by one position, so that rotary embedding favours the token just before.
    """
    head_dim = attention.head_dim
    rope = cast(dict[str, float], attention.config.rope_parameters)
    turn = _one_step_rotation(head_dim, rope["rope_theta"])
    query, key = attention.q_proj.weight, attention.k_proj.weight
    for part in range(shape.extra // head_dim):
        channels = slice(part * head_dim, (part + 1) * head_dim)
        key[channels] = 0.0
        key[channels, : shape.width] = turn @ directions[:, channels].T
        n_groups = attention.num_key_value_groups
        for head in range(part * n_groups, (part + 1) * n_groups):
            rows = slice(head * head_dim, (head + 1) * head_dim)
            query[rows] = 0.0
            query[rows, shape.width + channels.start : shape.width + channels.stop] = torch.eye(head_dim)


def _one_step_rotation(head_dim: int, theta: float) -> Tensor:
    """The rotary embedding of one position as a matrix (half-split layout)."""
    half = head_dim // 2
    angles = theta ** (-torch.arange(half) / half)
    cos, sin = torch.diag(angles.cos()), torch.diag(angles.sin())
    return torch.cat([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)])


def _without_rows_from(row: int) -> Callable[[Tensor], Tensor]:
    """Gradient hook: the token's channels are read, never written."""

    def keep(gradient: Tensor) -> Tensor:
        return torch.cat([gradient[:row], torch.zeros_like(gradient[row:])])

    return keep
