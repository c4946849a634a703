from dataclasses import replace
from typing import get_args

import pytest
import torch

from runtime.edge.network import ffn_layers, watched
from runtime.edge.predictor import PredictorSettings, fit_predictors, low_rank, oracle, scores, with_recall
from runtime.edge.records import PredictorKind
from runtime.edge.sparse import sparse
from runtime.edge.text import batches, logits_of, perplexity
from runtime.errors import ConfigError
from tests.runtime.edge.models import gated_model, texts

NONE = [0.0] * 3


def test_the_oracle_scores_are_gates_up_to_the_norms_positive_factor() -> None:
    model, found = gated_model(), []
    layers = ffn_layers(model)

    def compare(index: int, residual: torch.Tensor, gate: torch.Tensor) -> None:
        factor = (residual.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        found.append((scores(oracle(layers[index]), residual) * factor - gate).abs().max())

    with watched(model, compare), torch.inference_mode():
        model(batches(texts())[0].token_ids)
    assert len(found) == 3
    assert max(found) < 1e-4


def test_a_run_by_the_oracle_is_the_dense_model() -> None:
    model, text = gated_model(), batches(texts())
    exact = fit_predictors(model, text, NONE, PredictorSettings("oracle"))
    dense = perplexity(logits_of(model), text)
    with sparse(model, exact, NONE):
        assert perplexity(logits_of(model), text) == pytest.approx(dense, rel=1e-5)
    assert all(one.recall > 0.9999 for one in exact)


def test_halves_of_opposite_sign_carry_a_linear_score_through_relu() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(24, 16, generator=generator), torch.randn(50, 16, generator=generator)
    fc1, fc2 = low_rank(weight, torch.eye(16), 16)
    assert torch.allclose(torch.relu(inputs @ fc1.T) @ fc2.T, inputs @ weight.T, atol=1e-4)


def test_low_rank_spends_its_rank_on_the_inputs_that_occur() -> None:
    """Inputs of rank four: rank four in their metric is exact, and in no metric it is not."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 16, generator=generator)
    inputs = torch.randn(200, 4, generator=generator) @ torch.randn(4, 16, generator=generator)
    wanted = inputs @ weight.T

    def error(moment: torch.Tensor) -> float:
        fc1, fc2 = low_rank(weight, moment, 4)
        return float((torch.relu(inputs @ fc1.T) @ fc2.T - wanted).norm() / wanted.norm())

    assert error(inputs.T @ inputs / 200) < 1e-3
    assert error(torch.eye(16)) > 0.1


@pytest.mark.parametrize("recall", [0.8, 0.95, 1.0])
def test_margins_reach_the_recall_of_every_neuron_on_what_they_were_fitted_to(recall: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(64, 32, generator=generator), torch.randn(600, 32, generator=generator)
    is_active = inputs @ weight.T > 2.0
    fc1, fc2 = low_rank(weight, torch.eye(32), 8)
    calibrated = with_recall(fc1, fc2, inputs, is_active, recall)
    is_predicted = torch.relu(inputs @ fc1.T) @ calibrated.T >= 0
    found = (is_predicted & is_active).sum(0) / is_active.sum(0)
    assert (found >= recall - 1e-6).all()
    before = torch.relu(inputs @ fc1.T) @ fc2.T >= 0
    assert ((before & is_active).sum() / is_active.sum() < 1) or recall < 1


@pytest.mark.parametrize("kind", ["low_rank", "mlp"])
def test_more_recall_is_bought_with_more_predicted_neurons(kind: PredictorKind) -> None:
    model, text = gated_model(), batches(texts(60))
    settings = PredictorSettings(kind, rank=8, steps=60)
    low, high = (fit_predictors(model, text, NONE, replace(settings, recall=recall)) for recall in (0.7, 0.99))
    for one, other in zip(low, high, strict=True):
        assert one.kind == kind
        assert (one.fc1.shape, one.fc2.shape) == ((16, 32), (96, 16))
        assert one.recall < other.recall
        assert one.predicted_active < other.predicted_active
        assert other.recall == pytest.approx(0.99, abs=0.06)  # of tokens it was not fitted to


def test_a_predictor_is_a_function_of_the_residuals_direction_alone() -> None:
    model = gated_model()
    one = fit_predictors(model, batches(texts(60)), NONE, PredictorSettings("mlp", rank=4, steps=20))[0]
    residual = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    assert torch.equal(scores(one, residual) >= 0, scores(one, residual * 64) >= 0)


def test_silu_models_keep_their_gates_and_refuse_anything_else() -> None:
    model, text = gated_model(activation="silu"), batches(texts())
    assert {one.kind for one in fit_predictors(model, text, NONE)} == {"gate"}
    for kind in ("low_rank", "mlp", "oracle"):
        with pytest.raises(ConfigError, match='use "gate", or fine-tune with relufy = true'):
            fit_predictors(model, text, NONE, PredictorSettings(kind))


def test_where_no_rank_is_good_enough_the_gate_itself_is_kept() -> None:
    kinds = {one.kind for one in fit_predictors(gated_model(), batches(texts(60)), NONE, PredictorSettings())}
    assert kinds <= set(get_args(PredictorKind))
    assert kinds == {"gate"}  # random weights have no low-rank copy


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="recall = 0 must be above 0"):
        PredictorSettings(recall=0)
    with pytest.raises(ConfigError, match="n_samples = 8 is too few"):
        PredictorSettings(n_samples=8)
