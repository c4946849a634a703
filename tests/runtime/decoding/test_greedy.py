"""Greedy decoding equals `model.generate` token by token, for every supported architecture."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutSchedule
from runtime.decoding.sampling import SamplingConfig
from runtime.models import LoadedModel, encode_prompt, load_policy
from runtime.records import Message, Prompt

TEXTS = ("a", "12 + 7 = ", "a much longer prompt than the other ones, to make the batch ragged", "xyz xyz", "?")
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
# Windows are shorter than the prompts, caps are low enough to bend every score.
MODELS: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel], dict[str, object]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2-window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"sliding_window": 9, "use_sliding_window": True, "layer_types": LAYERS},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral-window": (MistralConfig, MistralForCausalLM, {"sliding_window": 9}),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {
            "sliding_window": 9,
            "layer_types": LAYERS,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 5,
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {"sliding_window": 9, "layer_types": LAYERS, "query_pre_attn_scalar": 5},
    ),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"sliding_window": None}),
    "phi3-window": (Phi3Config, Phi3ForCausalLM, {"sliding_window": 9}),
}


def build(kind: str) -> PreTrainedModel:
    """A random model with four heads on two key-value heads; biases, where there are any, are not zero."""
    config_class, model_class, special = MODELS[kind]
    settings: dict[str, object] = {
        "vocab_size": 261,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config = config_class(**settings | special)
    torch.manual_seed(3)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model.eval()


def reference(model: PreTrainedModel, prompt_ids: list[int], n_new: int) -> list[int]:
    output = model.generate(
        torch.tensor([prompt_ids]), attention_mask=torch.ones(1, len(prompt_ids)), do_sample=False, max_new_tokens=n_new
    )
    return output[0, len(prompt_ids) :].tolist()


def assert_equal_to_generate(loaded: LoadedModel, max_rows: int, n_new: int, n: int) -> None:
    original = copy.deepcopy(loaded.model)
    prompts = [Prompt(text, (Message("user", text),), "g") for text in TEXTS]
    sampling = SamplingConfig(n=n, temperature=0, max_new_tokens=n_new)
    engine = Engine(loaded, sampling, CutSchedule(), None, max_rows, "text")
    for prompt, candidates in zip(prompts, engine.generate(prompts), strict=True):
        expected = reference(original, encode_prompt(loaded.tokenizer, prompt.messages, "text"), n_new)
        assert [list(candidate.token_ids) for candidate in candidates] == [expected] * n


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("max_rows", "n"), [(64, 1), (2, 1), (5, 2)])
def test_greedy_equals_generate(
    kind: str, max_rows: int, n: int, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    assert_equal_to_generate(LoadedModel(build(kind), tokenizer, kind, ""), max_rows, n_new=30, n=n)


def test_greedy_stops_where_generate_stops(tiny_policy_dir: Path) -> None:
    assert_equal_to_generate(load_policy(str(tiny_policy_dir)), max_rows=3, n_new=60, n=1)


@pytest.mark.shared
def test_greedy_equals_generate_on_a_trained_model(shared_models: Path) -> None:
    assert_equal_to_generate(load_policy(str(shared_models / "stories3m")), max_rows=4, n_new=80, n=2)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_model_still_generates_and_trains_as_before(
    kind: str, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    """The engine's attention is inert outside the engine, with padding and gradients too."""
    model = build(kind)
    original = copy.deepcopy(model)
    Engine(LoadedModel(model, make_tokenizer(), "m", ""), SamplingConfig(), CutSchedule(), None, 16)
    ids = torch.tensor([[0, 0, 7, 8, 9], [5, 6, 7, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for left, right in ((model, original), (original, model)):
        assert torch.equal(
            left.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8),
            right.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8),
        )
    losses = [m(input_ids=ids, attention_mask=mask, labels=ids).loss for m in (model, original)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(losses[0], losses[1], atol=1e-6)
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, original.model.embed_tokens.weight.grad)
