"""Tiny random models with gated feed-forward layers of a chosen activation, and text for them."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from runtime.edge.text import Text

SIZES: dict[str, object] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gated_model(kind: str = "llama", activation: str = "relu", **changes: object) -> PreTrainedModel:
    """Random, float32, with norms that are not all ones; seeded."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**SIZES, "hidden_act": activation, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def texts(n: int = 12, seed: int = 0, vocab_size: int = 67) -> list[Text]:
    """Random ids, 5 to 40 each, with prompts of three."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 41, (n,), generator=generator).tolist()
    return [Text(torch.randint(3, vocab_size, (length,), generator=generator).tolist(), 3) for length in lengths]
