import numpy as np
import pytest
import torch

from runtime.edge.network import shape_of
from runtime.edge.predictor import gate_predictor
from runtime.edge.profile import ProfileSettings, profile
from runtime.edge.sparse import sparse
from runtime.edge.text import Text, batches, logits_of, perplexity
from runtime.errors import InputError, ModelError
from tests.runtime.edge.models import gated_model, texts


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_frequencies_are_those_of_the_model_run_text_by_text(kind: str) -> None:
    model, text = gated_model(kind), texts()
    found = profile(model, batches(text, max_tokens=64))
    counts, n_tokens = np.zeros((3, 96)), 0
    for one in text:
        states = model.model(torch.tensor([one.token_ids]), output_hidden_states=True).hidden_states
        n_tokens += len(one.token_ids)
        for index, layer in enumerate(model.model.layers):
            block = layer(states[index], position_embeddings=_rotary(model, one), attention_mask=_causal(one))
            residual = block - layer.mlp(layer.post_attention_layernorm(_before(layer, states[index], model, one)))
            gate = layer.mlp.gate_proj(layer.post_attention_layernorm(residual))
            counts[index] += (gate[0] > 0).sum(dim=0).numpy()
    assert found.n_tokens == n_tokens
    for index, layer in enumerate(found.layers):
        assert np.abs(layer.frequency - counts[index] / n_tokens).max() <= 2 / n_tokens  # signs at zero, by rounding


def _rotary(model, one):
    return model.model.rotary_emb(torch.zeros(1, 1, 32), torch.arange(len(one.token_ids))[None])


def _causal(one):
    length = len(one.token_ids)
    return torch.full((length, length), -torch.inf).triu(1)[None, None]


def _before(layer, state, model, one):
    attended, _ = layer.self_attn(
        layer.input_layernorm(state), position_embeddings=_rotary(model, one), attention_mask=_causal(one)
    )
    return state + attended


def test_padding_and_the_size_of_batches_change_nothing() -> None:
    model, text = gated_model(), texts()
    small, large = (profile(model, batches(text, size)) for size in (1, 4096))
    for one, other in zip(small.layers, large.layers, strict=True):
        assert np.abs(one.frequency - other.frequency).max() <= 2 / small.n_tokens


def test_the_kept_patterns_are_a_bounded_sample_that_all_layers_share() -> None:
    found = profile(gated_model(), batches(texts()), ProfileSettings(n_samples=50))
    assert all(layer.active.shape == (50, 12) and layer.active.dtype == np.uint8 for layer in found.layers)
    whole = profile(gated_model(), batches(texts()), ProfileSettings(n_samples=10**6))
    for layer in whole.layers:
        bits = np.unpackbits(layer.active, axis=1)[:, :96]
        assert len(bits) == whole.n_tokens
        assert np.allclose(bits.mean(axis=0), layer.frequency, atol=1e-6)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7])
def test_a_silu_threshold_leaves_the_asked_share_out(sparsity: float) -> None:
    found = profile(gated_model(activation="silu"), batches(texts()), ProfileSettings(sparsity=sparsity))
    for layer in found.layers:
        assert 1 - layer.frequency.mean() == pytest.approx(sparsity, abs=0.01)
        assert (layer.threshold > 0) == (sparsity > 0)


def test_a_sparse_run_without_threshold_is_the_model_and_with_one_is_not() -> None:
    model, text = gated_model(activation="silu"), batches(texts())
    gates = [gate_predictor(shape_of(model))] * 3
    dense = perplexity(logits_of(model), text)
    with sparse(model, gates, [0.0] * 3):
        assert perplexity(logits_of(model), text) == pytest.approx(dense, rel=1e-6)
    with sparse(model, gates, [0.3] * 3):
        assert perplexity(logits_of(model), text) != pytest.approx(dense, rel=1e-4)
    assert perplexity(logits_of(model), text) == dense


def test_perplexity_is_that_of_the_tokens_after_the_prompts() -> None:
    model, text = gated_model(), texts(3)
    total, count = 0.0, 0
    for one in text:
        ids = torch.tensor([one.token_ids])
        logps = model(ids).logits.detach().log_softmax(-1)[0]
        for place in range(3, len(one.token_ids)):
            total -= float(logps[place - 1, one.token_ids[place]])
            count += 1
    assert perplexity(logits_of(model), batches(text, 64)) == pytest.approx(np.exp(total / count), rel=1e-5)


def test_text_without_answers_is_refused() -> None:
    with pytest.raises(InputError, match="no calibration text"):
        batches([Text([1, 2, 3], 3), Text([1])])


def test_models_that_a_bundle_cannot_hold_are_refused() -> None:
    with pytest.raises(
        ModelError, match='hidden_act = "gelu" cannot be exported by neuron .relu, silu can.; use format = hf'
    ):
        shape_of(gated_model(activation="gelu"))
    with pytest.raises(ModelError, match='architecture "gemma2" cannot be exported by neuron .llama, mistral'):
        shape_of(gated_model("gemma2", head_dim=8))
    with pytest.raises(ModelError, match="mlp_bias"):
        shape_of(gated_model(mlp_bias=True))
