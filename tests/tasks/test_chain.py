"""All stages, called as plain functions, on tiny random models."""

import json
import math
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

from runtime.edge.bundle import open_bundle
from runtime.models import load_policy
from runtime.records import Prompt
from storage.catalog import query
from storage.lake import Lake
from tasks import assemble, evaluate, export, finetune, generate, ingest, score
from tasks.errors import ConfigError, ModelError
from tasks.plan import plan, steps
from tasks.settings import PipelineConfig

N_PROMPTS, N = 10, 6


def odd_length(prompt: Prompt, response: str) -> float:
    """A reward that fails on some rows and is no number on others."""
    if len(response) % 7 == 0:
        raise ValueError("seven")
    return math.nan if len(response) % 5 == 0 else float(len(response))


def answer_length(prompt: Prompt, response: str) -> float:
    """A reward that always works."""
    return float(len(response))


def constant(prompt: Prompt, response: str) -> float:
    """A reward that says nothing."""
    return 1.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_policy_dir: Path, tiny_reward_dir: Path) -> PipelineConfig:
    """A pipeline on tiny models that takes seconds."""
    source = tmp_path_factory.mktemp("source") / "prompts.jsonl"
    rows = [{"prompt": f"What is {i}?", "group": "abc"[i % 3]} for i in range(N_PROMPTS + 4)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy, reward = str(tiny_policy_dir), {"reward_model": str(tiny_reward_dir), "threads": 1}
    return PipelineConfig.model_validate(
        {
            "name": "tiny",
            "ingest": {"source": str(source), "heldout_fraction": 0.3},
            "generate": reward
            | {
                "model": policy,
                "n": N,
                "max_new_tokens": 24,
                "shard_prompts": 3,
                "max_rows": 16,
                "cut_tokens": [4],
                "cut_keep": [0.5],
            },
            "score": reward,
            "finetune": {"model": policy, "epochs": 1, "batch_size": 4, "threads": 1, "report_to": "none"},
            "evaluate": reward | {"samples": 2, "max_new_tokens": 16, "truth": "none", "max_rows": 16},
        }
    )


def run_chain(config: PipelineConfig, root: str, until: str = "export") -> Lake:
    """Run every stage up to `until` without Prefect."""
    lake = Lake.open(root)
    for stage, step in steps(config, lake).items():
        if stage == "generate":
            count = generate.count_shards(step, root)
            for index in range(count):
                generate.generate_shard.fn(step, root, index, count)
            generate.publish.fn(step, root, count)
        elif stage == "score":
            count = score.count_shards(step, root)
            for index in range(count):
                score.score_shard.fn(step, root, index, count)
            score.publish.fn(step, root, count)
        elif stage == "evaluate":
            for which in evaluate.MODELS:
                evaluate.answer.fn(step, root, which)
            evaluate.compare.fn(step, root)
        else:
            single = {
                "ingest": ingest.ingest,
                "assemble": assemble.assemble,
                "finetune": finetune.finetune,
                "export": export.export,
            }
            single[stage].fn(step, root)
        if stage == until:
            break
    return lake


@pytest.fixture(scope="module")
def lake(config: PipelineConfig, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """A lake in which the whole chain ran."""
    return run_chain(config, str(tmp_path_factory.mktemp("chain") / "lake"))


def test_every_prompt_has_n_candidates_and_cut_ones_have_no_final_score(lake: Lake) -> None:
    rows = lake.read_table(lake.resolve("candidates/tiny"), "candidates").to_pylist()
    n_train = lake.read_table(lake.resolve("prompts/tiny"), "prompts", "train").num_rows
    assert len(rows) == N * n_train
    cut = [row for row in rows if row["finish_reason"] == "cut"]
    assert cut
    assert all(row["score"] is None and row["cut_at_token"] == 4 == row["n_tokens"] for row in cut)
    assert all(row["score"] is not None for row in rows if row["finish_reason"] in ("eos", "length"))
    assert all(row["cuts"][0]["n_tokens"] == 4 for row in rows if row["n_tokens"] > 4)


def test_pairs_keep_prompt_group_and_lineage(lake: Lake) -> None:
    ref = lake.resolve("preferences/tiny")
    prompts = {row["prompt_id"]: row for row in lake.read_table(lake.resolve("prompts/tiny"), "prompts").to_pylist()}
    pairs = lake.read_table(ref, "preferences").to_pylist()
    assert pairs
    for pair in pairs:
        assert pair["prompt"] == prompts[pair["prompt_id"]]["messages"]
        assert pair["group"] == prompts[pair["prompt_id"]]["group"]
        assert pair["score_margin"] > 0
    inputs = lake.manifest(ref).inputs
    assert inputs["prompts"] == str(lake.resolve("prompts/tiny"))
    assert inputs["candidates"] == str(lake.resolve("candidates/tiny"))


def test_the_finetuned_and_the_exported_model_load(lake: Lake, config: PipelineConfig) -> None:
    model = load_policy(str(lake.folder(lake.resolve("models/tiny"), "model"))).model
    stored = open_bundle(lake.folder(lake.resolve("bundles/tiny"), "bundle"))
    assert (stored.manifest.shape.n_layers, stored.manifest.shape.intermediate) == (4, 64)
    base = load_policy(config.finetune.model).model
    assert any((a != b).any() for a, b in zip(model.parameters(), base.parameters(), strict=True))


def test_the_evaluation_compares_both_models_on_held_out_prompts_only(lake: Lake) -> None:
    ref = lake.resolve("candidates/tiny-evaluation")
    held_out = set(lake.read_table(lake.resolve("prompts/tiny"), "prompts", "test")["prompt_id"].to_pylist())
    for which in ("before", "after"):
        answers = lake.read_table(ref, "candidates", which)
        assert set(answers["prompt_id"].to_pylist()) == held_out
        assert answers.num_rows == 2 * len(held_out)
    result = query(lake, "SELECT DISTINCT model, metric FROM metrics ORDER BY ALL")
    assert ("before", "classifier") in result.rows
    assert ("after", "n_tokens") in result.rows


def test_a_plan_of_what_ran_is_all_cache_hits(lake: Lake, config: PipelineConfig) -> None:
    assert all(stage.is_cached for stage in plan(config, lake))


def test_a_lost_shard_and_manifest_come_back_byte_for_byte(lake: Lake, config: PipelineConfig, tmp_path: Path) -> None:
    root = tmp_path / "lake"
    shutil.copytree(lake.root, root)
    step = steps(config, Lake.open(str(root)))["generate"]
    folder = Path(Lake.open(str(root)).ref(step.kind, step.name, step.version).uri)
    shards = sorted(folder.glob("candidates/*.parquet"))
    before = {shard.name: shard.read_bytes() for shard in shards}
    assert len(shards) > 2
    (folder / "manifest.json").unlink()
    shards[1].unlink()
    run_chain(config, str(root), until="generate")
    assert {shard.name: shard.read_bytes() for shard in shards} == before


def _changed(config: PipelineConfig, stage: str, **values: object) -> PipelineConfig:
    dumped = config.model_dump()
    dumped[stage] |= values
    return PipelineConfig.model_validate(dumped)


def test_prompts_longer_than_the_context_become_error_rows(config: PipelineConfig, tmp_path: Path) -> None:
    source = tmp_path / "p.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"{i}" * length}) + "\n" for i, length in ((1, 3), (2, 400))))
    changed = _changed(_changed(config, "ingest", source=str(source), heldout_fraction=0.0), "generate", n=2)
    lake = run_chain(changed, str(tmp_path / "lake"), until="generate")
    rows = lake.read_table(lake.resolve("candidates/tiny"), "candidates").to_pylist()
    assert sorted(row["status"] for row in rows) == ["error", "error", "ok", "ok"]
    assert all("exceeds the context of 256 tokens" in row["error"] for row in rows if row["status"] == "error")


def test_a_reward_that_fails_on_a_row_marks_that_row_only(config: PipelineConfig, tmp_path: Path) -> None:
    plain = _changed(config, "generate", cut_policy="none")
    function = {"reward": "function", "reward_function": f"{__name__}:odd_length", "reward_model": "starter"}
    lake = run_chain(_changed(plain, "score", **function), str(tmp_path / "lake"), until="score")
    rows = lake.read_table(lake.resolve("candidates/tiny"), "candidates").to_pylist()
    for row in rows:
        length = len(row["response"])
        is_bad = length % 7 == 0 or length % 5 == 0
        assert row["status"] == ("error" if is_bad else "ok")
        assert row["score"] == (None if is_bad else float(length))
    assert {row["status"] for row in rows} == {"error", "ok"}


def test_only_allowed_functions_are_imported(config: PipelineConfig, tmp_path: Path) -> None:
    function = {"reward": "function", "reward_function": "os:system", "reward_model": "starter"}
    with pytest.raises(ConfigError, match=r'function "os:system" is not allowed; set WINNOW_FUNCTIONS="os:system"'):
        run_chain(_changed(config, "score", **function), str(tmp_path / "lake"), until="score")


def test_reward_terms_are_added(config: PipelineConfig, tiny_policy_dir: Path, tmp_path: Path) -> None:
    """Cuts and final scores by a classifier, a likelihood and a function together."""
    terms = [f"0.5*likelihood:{tiny_policy_dir}", "-2*function:tests.tasks.test_chain:answer_length"]
    both = _changed(_changed(config, "generate", reward_terms=terms), "score", reward_terms=terms)
    rows, plain = (
        {(r["prompt_id"], r["candidate_index"]): r for r in lake.read_table(ref, "candidates").to_pylist()}
        for lake in (run_chain(one, str(tmp_path / name), "score") for name, one in (("a", both), ("b", config)))
        for ref in [lake.resolve("candidates/tiny")]
    )
    shared = [key for key, row in rows.items() if row["score"] is not None and plain[key]["score"] is not None]
    assert shared
    for key in shared:
        assert rows[key]["scores"][0]["scorer"] == "combined"
        rest = rows[key]["score"] - plain[key]["score"] + 2 * answer_length(None, rows[key]["response"])  # type: ignore[arg-type]
        assert -10 < rest < 0  # half of a mean log-probability


def test_a_reward_that_says_nothing_is_refused(config: PipelineConfig, tmp_path: Path) -> None:
    function = {"reward": "function", "reward_function": f"{__name__}:constant", "reward_model": "starter"}
    with pytest.raises(ConfigError, match="answers have the score 1.0; choose another reward"):
        run_chain(_changed(config, "score", **function), str(tmp_path / "lake"), until="score")


def test_a_reward_model_with_two_labels_is_refused(
    config: PipelineConfig, tiny_reward_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "two"
    wide = AutoConfig.from_pretrained(tiny_reward_dir, num_labels=2)
    LlamaForSequenceClassification(wide).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_reward_dir).save_pretrained(folder)
    changed = _changed(config, "generate", reward_model=str(folder))
    with pytest.raises(ModelError, match="has 2 labels; a reward model needs num_labels = 1"):
        run_chain(changed, str(tmp_path / "lake"), until="generate")


def test_a_model_without_a_chat_template_is_refused_for_conversations(
    config: PipelineConfig, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(tiny_policy_dir, folder)
    for name in ("chat_template.jinja",):
        (folder / name).unlink()
    changed = _changed(config, "generate", model=str(folder))
    with pytest.raises(ModelError, match='no chat template; set prompt_format = "text"'):
        run_chain(changed, str(tmp_path / "lake"), until="generate")


def test_stages_without_their_input_say_what_to_run(config: PipelineConfig, tmp_path: Path) -> None:
    lake = run_chain(config, str(tmp_path / "lake"), until="generate")
    unscored = config.assemble.model_copy(update={"name": "tiny"})
    with pytest.raises(ConfigError, match="has no scores; run `winnow score` on it first"):
        assemble.assemble.fn(assemble.prepare(unscored, lake), lake.root)
    no_pairs = config.stage(config.assemble).model_copy(update={"min_margin": 1e9})
    run_chain(config, lake.root, until="score")
    with pytest.raises(ConfigError, match="lower min_margin"):
        assemble.assemble.fn(assemble.prepare(no_pairs, lake), lake.root)
