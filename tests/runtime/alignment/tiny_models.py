"""Tiny random models of many architectures that compute in float64, and their gradients."""

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What differs between hidden states and logits: nothing, a shared matrix, soft-capping, scaling, a bias.
MODELS: dict[str, dict[str, object]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": None, "head_dim": 4},
    "gemma3_text": {"final_logit_softcapping": 2.0, "head_dim": 4},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "phi": {},
    "mixtral": {"num_local_experts": 2, "experts_implementation": "eager"},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0},
    "bloom": {"n_layer": 2, "n_head": 4},
}


def tiny_model(kind: str = "llama", seed: int = 0, vocab_size: int = 67) -> PreTrainedModel:
    """A random model of two layers in float64, through and through."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[kind](**{**SIZES, **MODELS[kind], "vocab_size": vocab_size})
    model = AutoModelForCausalLM.from_config(config).double().eval()
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):  # most of them compute in float32 whatever the weights are
            module.forward = lambda x: layer_norm(x, x.shape[-1:])
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    return model


def gradients(model: nn.Module, found: Tensor) -> dict[str, Tensor]:
    """Of a weighted sum of what was found, by parameter."""
    model.zero_grad()
    weights = torch.linspace(-1, 2, found.numel(), dtype=found.dtype)
    (found.flatten() * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same parameters with the same gradients."""
    assert found.keys() == wanted.keys()
    assert wanted
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-11)
