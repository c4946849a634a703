import pytest
import torch

from runtime.edge.measure import ExportSettings, QualityError, check_engine, check_promise, measure
from runtime.edge.network import ffn_layers
from runtime.edge.predictor import PredictorSettings
from runtime.edge.quality import Quality, as_stored
from runtime.edge.quantise import dequantise, quantise
from runtime.edge.records import WeightFormat
from runtime.edge.text import Text, batches
from runtime.errors import ConfigError
from runtime.models import LoadedModel
from tests.runtime.edge.models import gated_model, texts


def _loaded(activation: str) -> LoadedModel:
    return LoadedModel(gated_model(activation=activation), None, "random", "")  # type: ignore[arg-type]


def _own_words(loaded: LoadedModel, seed: int) -> list[Text]:
    """What the model says itself, so that anything left out makes it less likely."""
    starts = torch.tensor([one.token_ids[:3] for one in texts(16, seed)])
    mask, more = torch.ones_like(starts), {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    said = loaded.model.generate(starts, attention_mask=mask, pad_token_id=0, **more)
    return [Text(row.tolist(), 3) for row in said]


def test_the_numbers_as_stored_are_those_of_the_format_and_the_model_stays() -> None:
    model = gated_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stored = as_stored(model, "int8", 16)
    gate = ffn_layers(model)[1].weight("gate")
    assert torch.equal(ffn_layers(stored)[1].weight("gate"), dequantise(quantise(gate, "int8", 16)))
    down = ffn_layers(model)[2].weight("down")  # scales go along a neuron's row
    assert torch.equal(ffn_layers(stored)[2].weight("down"), dequantise(quantise(down, "int8", 16)))
    norm = model.model.norm.weight
    assert torch.equal(stored.model.norm.weight, norm.to(torch.bfloat16).float())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4"])
def test_fewer_bits_cost_more(format: WeightFormat) -> None:
    model, text = _loaded("relu"), batches(texts(40))
    settings = ExportSettings(format, 32, PredictorSettings("gate"), max_delta=1.0)
    cost = measure(model, text, batches(texts(20, seed=1)), settings).quality
    limit = {"float32": 1e-6, "bfloat16": 3e-3, "int8": 1e-2, "int4": 0.2}[format]
    assert abs(cost.delta) < limit
    assert cost.exported == pytest.approx(cost.stored, rel=1e-6)  # exact gates leave nothing out
    assert cost.n_tokens == sum(int(batch.is_asked.sum()) for batch in batches(texts(20, seed=1)))


def test_a_silu_model_leaves_out_as_much_as_the_promise_allows() -> None:
    model = _loaded("silu")
    fitted, held_out = batches(_own_words(model, 0)), batches(_own_words(model, 1))
    tight, loose = (
        measure(model, fitted, held_out, ExportSettings("float32", max_delta=delta)) for delta in (0.02, 0.5)
    )
    assert tight.sparsity is not None and loose.sparsity is not None
    assert tight.sparsity < loose.sparsity == 0.7
    assert tight.quality.delta <= 0.02
    with pytest.raises(ConfigError, match="this model has silu, which leaves no neuron out"):
        measure(model, fitted, held_out, ExportSettings("float32", max_delta=-1.0))


@pytest.mark.parametrize(
    ("cost", "sparsity", "fix"),
    [
        (Quality(2.0, 2.0, 2.2, 9), None, "raise recall"),
        (Quality(2.0, 2.0, 2.2, 9), 0.5, "lower sparsity"),
        (Quality(2.0, 2.2, 2.2, 9), None, "use more bits than weight_format = int4"),
    ],
)
def test_a_broken_promise_names_the_part_that_broke_it(cost: Quality, sparsity: float | None, fix: str) -> None:
    with pytest.raises(QualityError, match=rf"perplexity rises by 10.00% .*promised 0.50%, .*; {fix}, or raise"):
        check_promise(cost, ExportSettings("int4", sparsity=sparsity))


def test_our_runtime_is_held_to_the_promise_too() -> None:
    check_engine(0.005, ExportSettings())
    with pytest.raises(QualityError, match="perplexity rises by 0.60% in our own runtime, above the promised 0.50%"):
        check_engine(0.006, ExportSettings())
