"""The export stage: what each format publishes, what it promises, and what it refuses in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from runtime.edge.bundle import open_bundle
from runtime.edge.engine import EdgeModel
from runtime.edge.gguf import check_powerinfer
from runtime.edge.gguf_lint import problems
from runtime.edge.measure import QualityError
from runtime.models import load_policy, quiet
from runtime.starter import path as starter
from storage.lake import Lake
from storage.report.pictures import stage_pictures
from storage.schema import to_table
from storage.writer import Provenance, Shard
from tasks import export
from tasks.edge_answer import edge_answer
from tasks.errors import ConfigError, ModelError
from tasks.plan import steps
from tasks.settings import ExportConfig, PipelineConfig
from tests.runtime.edge.models import gated_model

VERSION = "0123456789ab"
N_PROMPTS = 24


def _candidate(number: int, index: int, score: float | None, reason: str = "eos") -> dict[str, object]:
    total = number + 12
    return {
        "prompt_id": f"p{number:02}",
        "group": "clerk",
        "candidate_index": index,
        "response": f"Sum {number} + 7 = {number + 7}; {number + 7} + 5 = {total}; result {total}.",
        "token_ids": [1],
        "n_tokens": 1,
        "finish_reason": reason,
        "cut_at_token": None,
        "cuts": [],
        "score": score,
        "scores": [],
        "generator": "test",
        "seed": 0,
        "status": "ok",
        "error": None,
    }


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """A lake with prompts of the starter's kind, and finished, cut and unscored answers."""
    lake = Lake.open(str(tmp_path_factory.mktemp("export") / "lake"))
    asked = "One line for the front desk, please. What is {} + 7 + 5 ?"
    empty = dict.fromkeys(("reference", "license"))
    prompts = [
        {"prompt_id": f"p{i:02}", "messages": [{"role": "user", "content": asked.format(i)}], "group": "clerk"}
        | {"source": "test", **empty}
        for i in range(N_PROMPTS)
    ]
    writer = lake.writer("prompts", "main", VERSION)
    writer.write(Shard("prompts", "train", 0, 1), to_table("prompts", prompts))
    held_out = prompts[3] | {"prompt_id": "h3"}
    writer.write(Shard("prompts", "test", 0, 1), to_table("prompts", [held_out]))
    ref = writer.commit(Provenance("ingest", {}, {}, {}, "winnow"))
    rows = [_candidate(i, j, (None, 1.0, 2.0)[j]) for i in range(N_PROMPTS) for j in range(3)]
    rows += [_candidate(i, 3, None, "cut") for i in range(N_PROMPTS)]
    writer = lake.writer("candidates", "main", VERSION)
    writer.write(Shard("candidates", "train", 0, 1), to_table("candidates", rows))
    writer.commit(Provenance("score", {}, {"prompts": str(ref)}, {}, "winnow"))
    return lake


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ReLU model with enough neurons for PowerInfer, and the starter's tokenizer."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(starter("policy"), folder)
    model = gated_model(hidden_size=64, intermediate_size=1024, num_hidden_layers=2, vocab_size=640, head_dim=16)
    model.config.max_position_embeddings = 256
    model.save_pretrained(folder)
    return folder


def _run(lake: Lake, model: str | Path = "starter", **changed: object) -> tuple[dict[str, object], Path]:
    """Statistics and folder of an export."""
    values = {"model": str(model), "texts": 48, "max_perplexity_delta": 2.0, **changed}
    if values.get("format") != "gguf":
        values["calibration_tokens"] = 512
    config = ExportConfig.model_validate(values)
    ref = export.export.fn(export.prepare(config, lake), lake.root)
    return lake.manifest(ref).stats, lake.folder(ref, config.format)


def test_a_bundle_runs_answers_and_keeps_its_promise(lake: Lake) -> None:
    stats, folder = _run(lake)
    assert stats["texts"] == 48
    assert abs(stats["perplexity_delta"]) <= 0.01
    assert abs(stats["perplexity_delta_in_runtime"]) <= 0.02  # some hundred tokens, computed in bfloat16
    assert [layer["layer"] for layer in stats["layers"]] == list(range(8))
    assert all(layer["recall"] > 0.9 for layer in stats["layers"])
    tokenizer = load_policy(str(starter("policy"))).tokenizer
    ids = tokenizer.encode("<s><|user|>What is 5 + 7 ?<|end|><|assistant|>")
    bundle = open_bundle(folder)
    assert bundle.manifest.quality["promised_delta"] == 0.02
    with EdgeModel(bundle) as engine:
        answer = engine.generate(ids, 60)
    with torch.inference_mode():
        dense = load_policy(str(starter("policy"))).model.generate(
            torch.tensor([ids]), max_new_tokens=60, do_sample=False, eos_token_id=2
        )
    assert answer[:8] == dense[0, len(ids) :][:8].tolist()


def test_the_curves_of_a_bundle_are_a_table_of_the_lake(lake: Lake) -> None:
    _run(lake)
    rows = lake.read_table(lake.resolve("bundles/main"), "edge").to_pylist()
    curve = [row["value"] for row in rows if (row["layer"], row["metric"]) == (3, "frequency")]
    assert curve == sorted(curve, reverse=True)
    assert {row["metric"] for row in rows if row["x"] is None} == {
        "active", "threshold", "hot", "recall", "predicted", "predictor_bytes"
    }  # fmt: skip


def test_a_bundle_has_its_pictures_and_says_what_memory_buys(lake: Lake) -> None:
    stats, folder = _run(lake)
    ref = lake.resolve("bundles/main")
    assert [picture.key for picture in stage_pictures(lake, ref)] == ["hot-cold", "recall"]
    plans = stats["plans"]
    assert [row["hit_rate"] for row in plans] == sorted(row["hit_rate"] for row in plans)
    assert plans[-1]["neurons_in_memory"] == plans[-1]["hit_rate"] == 1
    assert open_bundle(folder).manifest.plan == {"max_tokens": 1024, "shares": plans}


def test_half_of_the_neurons_give_the_answer_that_all_of_them_give(lake: Lake) -> None:
    _run(lake)
    found = edge_answer(lake, lake.resolve("bundles/main"), lake.resolve("prompts/main"))
    assert found.question.startswith("One line for the front desk")
    assert found.is_same
    assert found.answer
    assert found.budget_bytes < found.whole_bytes
    assert found.read_bytes > 0


@pytest.mark.slow
def test_an_export_is_the_same_bytes_again(lake: Lake, tmp_path: Path) -> None:
    _, folder = _run(lake)
    other = Lake.open(str(tmp_path / "lake"))
    shutil.copytree(Path(lake.root) / "prompts", Path(other.root) / "prompts")
    shutil.copytree(Path(lake.root) / "candidates", Path(other.root) / "candidates")
    _, again = _run(other)
    for name in ("manifest.json", "neurons.bin", "resident.safetensors"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "float32"])
def test_a_bundle_of_another_weight_format_keeps_its_promise(lake: Lake, weights: str) -> None:
    stats, folder = _run(lake, weight_format=weights, max_perplexity_delta=5.0)
    assert open_bundle(folder).manifest.weight_format == weights
    assert abs(stats["perplexity_delta_in_runtime"]) < 0.05


def test_a_gguf_file_loads_in_transformers_and_keeps_its_promise(lake: Lake) -> None:
    stats, folder = _run(lake, format="gguf")
    assert stats["perplexity_delta"] == pytest.approx(0, abs=1e-3)
    assert problems(folder / "model.gguf") == []
    with quiet():
        found = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype="float32")
    assert found.config.num_hidden_layers == 8


@pytest.mark.parametrize("predictor", ["oracle", "auto"])
def test_a_powerinfer_file_is_measured_as_it_was_written(lake: Lake, wide: Path, predictor: str) -> None:
    stats, folder = _run(lake, wide, format="powerinfer", predictor=predictor, max_perplexity_delta=100.0)
    assert problems(folder / "model.powerinfer.gguf") == []
    assert (abs(stats["perplexity_delta"]) < 1e-3) == (predictor == "oracle")


def test_a_plain_folder_needs_no_text(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    config = ExportConfig.model_validate({"model": "starter", "format": "hf"})
    ref = export.export.fn(export.prepare(config, lake), lake.root)
    assert load_policy(str(lake.folder(ref, "hf"))).content_hash == load_policy(str(starter("policy"))).content_hash


def test_a_bundle_with_an_oracle_is_the_model_in_our_own_runtime(lake: Lake) -> None:
    stats, folder = _run(lake, predictor="oracle", weight_format="float32")
    assert abs(stats["perplexity_delta_in_runtime"]) < 1e-3
    assert all(layer["recall"] > 0.999 for layer in stats["layers"])
    assert open_bundle(folder).manifest.layers[0].predictor == "low_rank"


BROKEN: dict[str, tuple[dict[str, object], str]] = {
    "bundle": ({"predictor": "low_rank", "recall": 0.05, "rank": 4}, "2.00%"),
    "gguf": ({"gguf_type": "Q4_0", "max_perplexity_delta": 0.0}, "0.00%"),
    "powerinfer": ({"predictor": "low_rank", "recall": 0.05, "rank": 4, "max_perplexity_delta": 0.0}, "0.00%"),
}


@pytest.mark.parametrize("format", BROKEN)
def test_an_export_that_costs_more_than_promised_is_not_published(lake: Lake, wide: Path, format: str) -> None:
    changed, promised = BROKEN[format]
    before = lake.versions("bundles")
    model = wide if format == "powerinfer" else "starter"
    with pytest.raises(
        QualityError, match=f"perplexity rises by .*, above the promised {promised}, so nothing is published"
    ):
        _run(lake, model, format=format, **changed)
    published = [ref for ref in lake.versions("bundles") if lake.find(ref.kind, ref.name, ref.version)]
    assert len(published) <= len(before)


@pytest.mark.parametrize("format", ["gguf", "powerinfer"])
def test_a_vocabulary_without_bytes_is_refused_before_anything_is_calibrated(
    lake: Lake, wide: Path, tmp_path: Path, format: str
) -> None:
    folder = without_bytes(wide, tmp_path)
    with pytest.raises(ModelError, match="the vocabulary has no byte tokens"):
        export.prepare(ExportConfig.model_validate({"model": str(folder), "format": format}), lake)
    with pytest.raises(ModelError, match="the vocabulary has no byte tokens"):
        check_powerinfer(load_policy(str(folder)), "F16")


def without_bytes(wide: Path, folder: Path) -> Path:
    """A copy of a model whose tokenizer cannot write every text."""
    found = Path(shutil.copytree(wide, folder / "no-bytes"))
    tokenizer = json.loads((found / "tokenizer.json").read_text())
    tokens = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {f"byte{n}" if token.startswith("<0x") else token: n for token, n in tokens.items()}
    tokenizer["model"]["byte_fallback"] = False
    (found / "tokenizer.json").write_text(json.dumps(tokenizer))
    return found


def _silu(folder: Path) -> Path:
    shutil.copytree(starter("policy"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "silu"}))
    return folder


def test_a_silu_model_gets_thresholds_and_says_how_many_neurons_they_leave_out(lake: Lake, tmp_path: Path) -> None:
    stats, _ = _run(lake, _silu(tmp_path / "silu"), sparsity=0.3, max_perplexity_delta=1000.0)
    assert stats["sparsity"] == 0.3
    assert all(layer["threshold"] > 0 and 0.65 < layer["active"] < 0.75 for layer in stats["layers"])


REFUSED: dict[str, tuple[Callable[[Path], Path], dict[str, object], str]] = {
    "silu": (_silu, {"sparsity": 0.0}, "this model has silu, which leaves no neuron out"),
    "silu with a predictor": (_silu, {"predictor": "low_rank"}, "not told from the residual"),
    "relu with a sparsity": (lambda _: Path("starter"), {"sparsity": 0.5}, "sparsity = 0.5 is for silu models"),
    "few neurons": (lambda _: Path("starter"), {"format": "powerinfer"}, "intermediate_size = 384: PowerInfer takes"),
    "rank": (
        lambda _: Path("starter"),
        {"predictor": "low_rank", "rank": 500},
        "rank = 500 is above hidden_size = 128",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_one_line(lake: Lake, tmp_path: Path, case: str) -> None:
    model, changed, message = REFUSED[case]
    with pytest.raises((ConfigError, ModelError), match=message):
        _run(lake, model(tmp_path / "model"), **changed)


def test_no_calibration_text_is_one_line(lake: Lake, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='no calibration text: "candidates/other" is not in the lake'):
        export.prepare(ExportConfig(name="other", model="starter"), lake)
    empty = Lake.open(str(tmp_path / "lake"))
    with pytest.raises(ConfigError, match="no calibration text: .* set export.candidates"):
        export.prepare(ExportConfig(model="starter"), empty)


def test_too_few_answers_are_one_line(lake: Lake) -> None:
    with pytest.raises(ConfigError, match="has too few finished answers to calibrate and measure on .0 and 0."):
        _run(lake, prompt_format="chat", candidates=_one_answer(lake))


def _one_answer(lake: Lake) -> str:
    writer = lake.writer("candidates", "few", VERSION)
    writer.write(Shard("candidates", "train", 0, 1), to_table("candidates", [_candidate(1, 0, None, "cut")]))
    inputs = {"prompts": str(lake.resolve("prompts/main"))}
    return str(writer.commit(Provenance("score", {}, inputs, {}, "winnow")))


def test_an_architecture_without_gates_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    folder = tmp_path / "gpt"
    shutil.copytree(starter("policy"), folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "hidden_act": "gelu"}))
    config = PipelineConfig.model_validate({"finetune": {"model": str(folder)}})
    with pytest.raises(ModelError, match='architecture "gpt2" cannot be exported by neuron .*; use format = hf'):
        steps(config, Lake.open(str(tmp_path / "lake")))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "hf", "recall": 0.9}, "export.recall = 0.9 does nothing with format = hf"),
        ({"format": "gguf", "weight_format": "int8"}, "export.weight_format = int8 does nothing with format = gguf"),
        ({"gguf_type": "F32"}, "export.gguf_type = F32 does nothing with format = bundle"),
    ],
)
def test_a_value_that_nothing_reads_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ExportConfig.model_validate(values)
