"""What a bundle computes: the model's own numbers, the same bits under every budget and however it is read."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.edge import batched, engine
from runtime.edge.budget import RunSettings, budget_of
from runtime.edge.bundle import open_bundle
from runtime.edge.bundle_write import write_bundle
from runtime.edge.engine import EdgeModel
from runtime.edge.quality import as_stored
from runtime.edge.reader import ReadSettings
from runtime.edge.records import LayerPlacement, WeightFormat
from runtime.errors import BundleError, ConfigError, InputError, PromptTooLong
from tests.runtime.edge.bundles import contents, written
from tests.runtime.edge.models import gated_model

IDS = [3, 17, 4, 60, 9, 33, 21, 8, 45, 12, 5, 28]
SETTINGS = RunSettings(max_tokens=48, prefill_tokens=5, read=ReadSettings(threads=2, gap_bytes=0))
WAYS = {
    "plain": SETTINGS,
    "two phases": replace(SETTINGS, two_phase=True),
    "no prefetch": replace(SETTINGS, prefetch=False),
    "no overlap": replace(SETTINGS, overlaps=False, prefetch=False),
    "nothing kept": replace(SETTINGS, keeps=False),
    "by matrix": replace(SETTINGS, by_matrix=True),
    "merged over gaps": replace(SETTINGS, read=ReadSettings(threads=1, gap_bytes=3 * 384)),
    "buffered": replace(SETTINGS, read=ReadSettings(threads=3, direct=False)),
}


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here is true of both ways to compute one token."""
    if request.param == "compiled":
        pytest.importorskip("numba", reason="needs numba: .venv/bin/pip install -e '.[native]'")
    else:
        monkeypatch.setattr(engine, "kernels", lambda dtype: None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    found = {name: written(root / name, name) for name in ("float32", "bfloat16", "int8", "int4")}
    found["silu"] = written(root / "silu", "float32", "silu")
    return found


@pytest.fixture
def opened(folders: dict[str, Path]) -> Iterator["Opener"]:
    opener = Opener(folders)
    yield opener
    for model in opener.models:
        model.close()


class Opener:
    """Opens bundles and remembers to close them."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders, self.models = folders, list[EdgeModel]()

    def __call__(self, name: str, share: float | None = None, settings: RunSettings = SETTINGS) -> EdgeModel:
        bundle = open_bundle(self.folders[name])
        self.models.append(EdgeModel(bundle, None, settings))
        if share is not None:
            whole = self.models[-1]
            budget = budget_of(whole.needs, settings, whole.dtype, share)
            self.models.append(EdgeModel(bundle, budget, settings))
        return self.models[-1]


def _stepwise(model: EdgeModel) -> Tensor:
    model.reset()
    return torch.stack([model.step(token).clone() for token in IDS])


@torch.inference_mode()
def _reference(activation: str = "relu", weight_format: WeightFormat = "float32") -> Tensor:
    return as_stored(gated_model(activation=activation), weight_format, 16)(torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize("name", ["float32", "int8", "int4"])
def test_a_bundle_with_exact_predictors_computes_the_model(opened: Opener, name: WeightFormat) -> None:
    model = opened(name, settings=replace(SETTINGS, dtype="float32"))
    # Beside integers, attention and predictors are bfloat16, as they are in what is compared with.
    tolerance = 1e-4 if name == "float32" else 0.02
    found = model.forward(IDS, is_sparse=name == "float32")  # rounding may open a gate that the predictor knows closed
    torch.testing.assert_close(found, _reference(weight_format=name), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_decoding_token_by_token_gives_what_a_whole_pass_gives(opened: Opener, name: str) -> None:
    model = opened(name)
    tolerance = 1e-4 if name == "float32" else 0.2
    torch.testing.assert_close(_stepwise(model).float(), model.forward(IDS), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "way"),
    [*(("float32", way) for way in WAYS), *((name, "two phases") for name in ("bfloat16", "int8", "int4", "silu"))],
)
def test_budget_threads_and_reading_never_change_a_bit(opened: Opener, name: str, way: str) -> None:
    whole, tight = opened(name), opened(name, 0.45, WAYS[way])
    assert tight.memory.total < whole.memory.total
    assert torch.equal(whole.forward(IDS), tight.forward(IDS))
    assert torch.equal(_stepwise(whole), _stepwise(tight))
    assert torch.equal(_stepwise(whole), _stepwise(tight))  # with whatever is in the cache by now
    assert tight.report().hit_rate < 1


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("name", ["bfloat16", "int8", "int4"])
def test_a_processor_without_bfloat16_gives_the_same_within_rounding(
    opened: Opener, name: WeightFormat, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of processor, whichever this is: what it multiplies in, and that no budget changes a bit."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: is_native)
    whole, tight = opened(name), opened(name, 0.45)
    assert whole.ffn.workspace.dtype == (torch.bfloat16 if is_native else torch.float32)
    assert torch.equal(_stepwise(whole), _stepwise(tight))
    found = whole.forward(IDS, is_sparse=False)
    torch.testing.assert_close(found, _reference(weight_format=name), rtol=0.2, atol=0.2)


def test_the_smallest_budget_works_and_one_byte_less_says_what_is_needed(opened: Opener) -> None:
    whole = opened("float32")
    with pytest.raises(ConfigError, match=r"give (\d+) or more") as refused:
        EdgeModel(open_bundle(opened.folders["float32"]), 1000, SETTINGS)
    least = int(str(refused.value).split("give ")[1].split()[0])
    with EdgeModel(open_bundle(opened.folders["float32"]), least, SETTINGS) as model:
        assert model.memory.total <= least
        assert torch.equal(_stepwise(model), _stepwise(whole))
    with pytest.raises(ConfigError, match=f"below the {least}"):
        EdgeModel(open_bundle(opened.folders["float32"]), least - 1, SETTINGS)


def test_reading_ahead_evicts_nothing_that_it_expects_to_be_used(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened("float32", 0.45)
    layer, ffn = model.ffn.layers[0], model.ffn
    cache, n_new = layer.cache, layer.cache.n_slots // 4
    assert n_new and cache.n_slots + n_new <= layer.n_cold
    cache.claim(np.arange(cache.n_slots), ffn.tick)  # full; the first ones are the oldest
    ffn.tick += 1
    cache.claim(np.arange(n_new, cache.n_slots), ffn.tick)
    expected = np.r_[0:n_new, cache.n_slots : cache.n_slots + n_new]
    monkeypatch.setattr(ffn, "predicted", lambda *_: expected)
    model.decoding._look_ahead(layer, torch.zeros(1, 1))
    ffn.reader.wait(layer.pending)
    assert (cache.slot_of[expected] >= 0).all()
    assert ffn.activity.n_prefetched == n_new


def test_a_new_order_of_neurons_changes_rounding_alone(tmp_path: Path, opened: Opener) -> None:
    rng, model = np.random.default_rng(3), gated_model()
    exact = replace(SETTINGS, dtype="float64")
    found = []
    for n_hot in (0, 40, 96):
        placements = tuple(LayerPlacement(rng.permutation(96), n_hot) for _ in range(3))
        write_bundle(tmp_path / str(n_hot), contents(model, placements=placements))
        opened.folders[str(n_hot)] = tmp_path / str(n_hot)
        found.append(_stepwise(opened(str(n_hot), settings=exact)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[0], found[2], rtol=1e-9, atol=1e-9)


def test_a_threshold_leaves_out_what_is_below_it(opened: Opener) -> None:
    sparse, reference = opened("silu"), _reference("silu")
    torch.testing.assert_close(sparse.forward(IDS, is_sparse=False), reference, rtol=1e-4, atol=1e-4)
    difference = (sparse.forward(IDS) - reference).abs().max()
    assert 1e-3 < difference < 1.0  # 0.05 of |silu(gate)| is little


def test_generated_text_is_that_of_transformers_and_the_same_under_a_budget(opened: Opener) -> None:
    model = gated_model()
    ids = torch.tensor([IDS])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)[0]
    whole, tight = opened("float32"), opened("float32", 0.4)
    found = whole.generate(IDS, 20)
    assert found == expected[len(IDS) :].tolist()
    assert tight.generate(IDS, 20) == found
    drawn = whole.generate(IDS, 20, temperature=1.0, seed=5)
    assert tight.generate(IDS, 20, temperature=1.0, seed=5) == drawn
    assert whole.generate(IDS, 20, temperature=1.0, seed=6) != drawn


def test_a_conversation_goes_on_from_what_is_in_memory(opened: Opener) -> None:
    model, other = opened("float32"), opened("float32")
    first = model.generate(IDS, 5)
    longer = [*IDS, *first, 7, 8, 9]
    assert model.generate(longer, 6) == other.generate(longer, 6)
    assert model.kv.n_tokens >= len(longer)


def test_reads_are_counted_as_the_kernel_counts_them(opened: Opener) -> None:
    model = opened("float32", 0.4)
    if not model.report().is_direct:
        pytest.skip("this file system has no O_DIRECT")
    before, counted = _kernel_reads(), model.report().read_bytes
    _stepwise(model)
    assert model.report().read_bytes - counted == _kernel_reads() - before > 0


def test_without_asynchronous_reads_the_bits_are_the_same(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = WAYS["no prefetch"]  # whether it is worth it is a matter of time, and changes what is read
    at_once = opened("bfloat16", 0.45, settings)
    found = _stepwise(at_once)
    monkeypatch.setattr(batched, "_CALLS", {})
    one_by_one = opened("bfloat16", 0.45, settings)
    assert torch.equal(_stepwise(one_by_one), found)
    assert one_by_one.report().n_reads == at_once.report().n_reads > 0
    assert one_by_one.ffn.reader.runway is None


def test_a_neuron_file_that_became_shorter_is_said(tmp_path: Path, opened: Opener) -> None:
    opened.folders["shorter"] = written(tmp_path / "shorter")
    model = opened("shorter", 0.4)
    os.truncate(tmp_path / "shorter" / "neurons.bin", 0)
    with pytest.raises(BundleError, match="became shorter while it was in use"):
        _stepwise(model)
    with pytest.raises(BundleError, match="open it again"):
        _stepwise(model)


def test_too_long_and_impossible_prompts_are_refused(opened: Opener) -> None:
    model = opened("float32")
    with pytest.raises(PromptTooLong, match="max_tokens = 48"):
        model.generate(IDS, 40)
    with pytest.raises(PromptTooLong, match="60 tokens are above max_tokens = 48"):
        model.forward(IDS * 5)
    for token in IDS * 4:
        model.step(token)
    with pytest.raises(PromptTooLong, match="48 tokens are all"):
        model.step(5)
    with pytest.raises(InputError, match="0 to 66"):
        model.generate([67], 4)
    with pytest.raises(InputError, match="empty prompt"):
        model.generate([], 4)
    with pytest.raises(ConfigError, match="dtype 'int3'"):
        opened("float32", settings=replace(SETTINGS, dtype="int3"))


def _kernel_reads() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
