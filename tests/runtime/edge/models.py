"""Tiny random models with gated feed-forward layers of a chosen activation, and text for them."""

from dataclasses import replace

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from runtime.edge.gguf_weights import Sparsity
from runtime.edge.network import ffn_layers, shape_of
from runtime.edge.predictor import oracle
from runtime.edge.records import LayerPlacement
from runtime.edge.text import Text
from runtime.models import LoadedModel, load_policy
from runtime.starter import path as starter

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


def starter_policy() -> LoadedModel:
    """The starter's."""
    return load_policy(str(starter("policy")))


def wide_model(policy: LoadedModel) -> LoadedModel:
    """Random, with enough neurons for PowerInfer, and the policy's tokenizer."""
    sizes = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 640}
    return replace(policy, model=gated_model(**sizes))


def exact(model: PreTrainedModel, seed: int = 0) -> Sparsity:
    """Oracles, and the neurons of every layer in an order of their own."""
    generator = np.random.default_rng(seed)
    neurons = shape_of(model).intermediate
    placements = [LayerPlacement(generator.permutation(neurons).astype(np.int64), 8) for _ in ffn_layers(model)]
    return Sparsity([oracle(layer) for layer in ffn_layers(model)], placements)
