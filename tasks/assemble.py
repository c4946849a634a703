"""Scored candidates to preference pairs; a prompt without a pair is a rejected row with its reason."""

from collections import Counter
from typing import cast

from prefect import task
from pydantic import JsonValue

from storage.lake import DatasetRef, Lake
from storage.pairs import PairResult, PairRules, build_pairs
from storage.writer import Shard
from tasks.artifacts import Cell, show_stage
from tasks.errors import ConfigError
from tasks.settings import AssembleConfig
from tasks.versions import Step, pin


def prepare(config: AssembleConfig, lake: Lake) -> Step:
    """The step, with its candidates pinned."""
    inputs = {"candidates": pin(lake, config.candidates, f"candidates/{config.name}")}
    return Step("assemble", "preferences", config.name, config.model_copy(update=inputs), inputs)


@task(name="assemble", persist_result=False)
def assemble(step: Step, lake_root: str) -> DatasetRef:
    """Pair, and publish pairs and rejected rows."""
    config, lake = step.config, Lake.open(lake_root)
    assert isinstance(config, AssembleConfig)
    source = lake.resolve(step.inputs["candidates"])
    candidates = lake.read_table(source, "candidates")
    if candidates["score"].null_count == candidates.num_rows:
        raise ConfigError(f"{source} has no scores; run `winnow score` on it first")
    prompts_ref = lake.manifest(source).inputs["prompts"]
    prompts = lake.read_table(lake.resolve(prompts_ref), "prompts")
    rules = PairRules(config.strategy, config.min_margin, config.max_pairs_per_group, config.seed)
    result = build_pairs(candidates, prompts, rules)
    if result.preferences.num_rows == 0:
        reasons = ", ".join(sorted(set(result.rejected["reason"].to_pylist())))
        raise ConfigError(f"{source} gives no pair ({reasons}); lower min_margin or generate more candidates")
    writer = step.writer(lake)
    writer.write(Shard("preferences", "train", 0, 1), result.preferences)
    writer.write(Shard("rejected", "train", 0, 1), result.rejected)
    groups = _per_group(result)
    stats: dict[str, JsonValue] = {
        "pairs": result.preferences.num_rows,
        "prompts_without_pair": dict(Counter(result.rejected["reason"].to_pylist())),
        "pairs_per_group": {str(row["group"]): cast(int, row["pairs"]) for row in groups},
    }
    ref = writer.commit(step.provenance(stats, {"prompts": prompts_ref}))
    show_stage(ref, stats, groups)
    return ref


def _per_group(result: PairResult) -> list[dict[str, Cell]]:
    pairs = result.preferences.select(["group", "score_margin"]).to_pylist()
    dropped = Counter(result.rejected["group"].to_pylist())
    margins: dict[str, list[float]] = {group: [] for group in sorted({*dropped, *(row["group"] for row in pairs)})}
    for row in pairs:
        margins[row["group"]].append(row["score_margin"])
    return [
        {
            "group": group,
            "pairs": len(found),
            "mean_margin": round(sum(found) / len(found), 6) if found else None,
            "prompts_without_pair": dropped[group],
        }
        for group, found in margins.items()
    ]
