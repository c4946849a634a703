"""Final scores: every finished answer is scored again from its text; partial scores stay in `cuts`."""

from functools import lru_cache
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
from prefect import task
from pydantic import JsonValue

from runtime.records import FINISHED
from storage.histogram import histogram
from storage.lake import DatasetRef, Lake
from storage.schema import to_table
from storage.writer import Shard
from tasks.artifacts import Cell, show_stage
from tasks.errors import ConfigError
from tasks.leases import use_gpu
from tasks.logs import log_shard, shard_name
from tasks.models import open_reward, reward_identity, use_threads
from tasks.pictures import show_picture
from tasks.retries import RETRIES
from tasks.rows import add_score, candidate_shards, prompts_of, rows_of
from tasks.settings import RewardConfig, ScoreConfig
from tasks.settings_execution import HERE, ExecutionConfig
from tasks.versions import Step, pin


def prepare(config: ScoreConfig, lake: Lake) -> Step:
    """The step, with its candidates and reward pinned."""
    inputs = {"candidates": pin(lake, config.candidates, f"candidates/{config.name}")}
    pinned = config.model_copy(update=inputs)
    return Step("score", "candidates", config.name, pinned, inputs, {"reward": reward_identity(config, lake)})


def count_shards(step: Step, lake_root: str) -> int:
    """As many as the candidates have."""
    lake = Lake.open(lake_root)
    return len(lake.manifest(lake.resolve(step.inputs["candidates"])).shards("candidates"))


@task(name="score-shard", task_run_name=shard_name, persist_result=False, **RETRIES)
def score_shard(step: Step, lake_root: str, index: int, count: int, execution: ExecutionConfig = HERE) -> int:
    """Score one shard; the number of tokens of its candidates."""
    config, lake = step.config, Lake.open(lake_root)
    assert isinstance(config, ScoreConfig)
    writer, shard = step.writer(lake), Shard("candidates", "train", index, count)
    if writer.has(shard):
        return 0
    use_gpu(execution.leased_gpus)
    use_threads(config.threads)
    source = lake.resolve(step.inputs["candidates"])
    candidates = lake.read_shard(source, "candidates", index)
    prompts = _prompts(lake.manifest(source).inputs["prompts"], lake.root)
    asked = prompts.filter(pc.is_in(prompts["prompt_id"], pc.unique(candidates["prompt_id"])))
    scored = scored_table(candidates, asked, config, lake)
    writer.write(shard, scored)
    n_tokens = int(pc.sum(scored["n_tokens"]).as_py() or 0)
    log_shard(step, shard, candidates=scored.num_rows, tokens=n_tokens)
    return n_tokens


@task(name="publish-scores", persist_result=False, **RETRIES)
def publish(step: Step, lake_root: str, count: int) -> DatasetRef:
    """Publish all shards as a version; refuses scores that say nothing."""
    lake = Lake.open(lake_root)
    writer = step.writer(lake)
    table = pa.concat_tables(shard.select(["group", "score", "status"]) for shard in candidate_shards(writer, count))
    stats, groups = summarise(table)
    if cast(int, stats["scored"]) > 1 and stats["spread"] == 0:
        raise ConfigError(f"all {stats['scored']} answers have the score {stats['mean_score']}; choose another reward")
    prompts = lake.manifest(lake.resolve(step.inputs["candidates"])).inputs["prompts"]
    found = histogram(table, "score")
    shown = {"groups": cast(JsonValue, groups), "score_histogram": found.model_dump() if found else None}
    ref = writer.commit(step.provenance(stats | shown, {"prompts": prompts}))
    show_stage(ref, stats, groups)
    show_picture(lake, ref)
    return ref


def scored_table(candidates: pa.Table, prompts: pa.Table, config: RewardConfig, lake: Lake) -> pa.Table:
    """`candidates` with `score` and `scores` filled for finished answers; a failing row gets status `error`."""
    batch_size = config.batch_size if isinstance(config, ScoreConfig) else 32
    reward = open_reward(config, lake, batch_size)
    by_id = {prompt.prompt_id: prompt for prompt in prompts_of(prompts)}
    rows = rows_of(candidates)
    finished = [row for row in rows if row["status"] == "ok" and row["finish_reason"] in FINISHED]
    asked = [by_id[str(row["prompt_id"])] for row in finished]
    scores = reward.score(asked, [str(row["response"]) for row in finished])
    for row, score in zip(finished, scores, strict=True):
        if score.value is None:
            row.update(status="error", error=score.error)
        else:
            row["score"] = score.value
            add_score(row, reward.name, score.value)
    return to_table("candidates", rows)


def summarise(table: pa.Table) -> tuple[dict[str, JsonValue], list[dict[str, Cell]]]:
    """Totals, and one row per group."""
    names = sorted(pc.unique(table["group"]).to_pylist())
    groups = [{"group": name} | _totals(table.filter(pc.equal(table["group"], name))) for name in names]
    return cast(dict[str, JsonValue], _totals(table)), groups


def _totals(table: pa.Table) -> dict[str, Cell]:
    scores = table["score"].drop_null()
    bounds = pc.min_max(scores).as_py()
    has_scores = len(scores) > 0
    return {
        "candidates": table.num_rows,
        "scored": len(scores),
        "errors": int(pc.sum(pc.equal(table["status"], "error")).as_py() or 0),
        "mean_score": round(pc.mean(scores).as_py(), 6) if has_scores else None,
        "best_score": round(bounds["max"], 6) if has_scores else None,
        "spread": round(bounds["max"] - bounds["min"], 6) if has_scores else None,
    }


@lru_cache(maxsize=1)
def _prompts(ref: str, lake_root: str) -> pa.Table:
    """Read once per process."""
    lake = Lake.open(lake_root)
    return lake.read_table(lake.resolve(ref), "prompts")
