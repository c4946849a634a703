"""Which models can be exported by neuron, by what their config says. Without torch, whose import takes seconds."""

from typing import Literal

from runtime.errors import ModelError

Activation = Literal["relu", "silu"]
# Pre-norm decoders whose layers have mlp.gate_proj, up_proj and down_proj behind post_attention_layernorm.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_ACTIVATIONS: dict[str, Activation] = {"relu": "relu", "silu": "silu", "swish": "silu"}


def check_architecture(model_type: str, hidden_act: str) -> Activation:
    """The activation, by what a config says; ModelError for what cannot be exported by neuron."""
    if model_type not in ARCHITECTURES:
        raise ModelError(
            f'architecture "{model_type}" cannot be exported by neuron ({", ".join(ARCHITECTURES)} can); '
            "use format = hf"
        )
    if hidden_act not in _ACTIVATIONS:
        raise ModelError(f'hidden_act = "{hidden_act}" cannot be exported by neuron (relu, silu can); use format = hf')
    return _ACTIVATIONS[hidden_act]
