"""Pairs out of scored candidates; whatever gives no pair is a rejected row with its reason."""

import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

import pyarrow.compute as pc
from prefect import task
from pydantic import JsonValue

from storage.assembly.assembly import Assembly, GroupReport, assembled
from storage.assembly.rules import AnswerRules, AssemblyRules, GroupRules, PairRules
from storage.lake import DatasetRef, Lake
from storage.screening.screen import ScreenRules, screen
from storage.writer import Shard, VersionWriter
from tasks.artifacts import Cell, show_stage
from tasks.errors import ConfigError
from tasks.pictures import show_picture
from tasks.retries import RETRIES
from tasks.settings import AssembleConfig
from tasks.versions import Step, pin

SHARD_ROWS = 50_000


def prepare(config: AssembleConfig, lake: Lake) -> Step:
    """The step, with its candidates and evaluation sets pinned."""
    candidates = pin(lake, config.candidates, f"candidates/{config.name}")
    sets = [pin(lake, text, f"prompts/{config.name}") for text in config.evaluation_sets]
    pinned = config.model_copy(update={"candidates": candidates, "evaluation_sets": sets})
    inputs = {"candidates": candidates} | {f"evaluation_{i}": ref for i, ref in enumerate(sets)}
    return Step("assemble", "preferences", config.name, pinned, inputs)


@task(name="assemble", persist_result=False, **RETRIES)
def assemble(step: Step, lake_root: str) -> DatasetRef:
    """Screen the prompts, pair, and publish pairs and rejected rows."""
    config, lake = step.config, Lake.open(lake_root)
    assert isinstance(config, AssembleConfig)
    source = lake.resolve(step.inputs["candidates"])
    candidates = lake.dataset(source, "candidates")
    if candidates.count_rows(filter=pc.field("score").is_valid()) == 0:
        raise ConfigError(f"{source} has no scores; run `winnow score` on it first")
    prompts_ref = lake.manifest(source).inputs["prompts"]
    prompts = lake.dataset(lake.resolve(prompts_ref), "prompts")
    evaluations = [lake.dataset(lake.resolve(ref), "prompts") for ref in config.evaluation_sets]
    rules = ScreenRules(config.near_duplicates, tuple(config.languages), config.evaluation_words)
    screened = screen(prompts, evaluations, rules)
    with (
        tempfile.TemporaryDirectory(prefix="winnow-") as spill,
        assembled(candidates, prompts, _rules(config), screened, Path(spill)) as assembly,
    ):
        groups = assembly.groups()
        if not any(assembly.n_pairs.values()):
            reasons = ", ".join(_total(group.dropped for group in groups))
            raise ConfigError(f"{source} gives no pair ({reasons}); lower min_margin or generate more candidates")
        writer = step.writer(lake)
        _write(assembly, writer)
        stats = _stats(assembly, groups)
    ref = writer.commit(step.provenance(stats, {"prompts": prompts_ref}))
    show_stage(ref, {key: value for key, value in stats.items() if key != "groups"}, _table(groups))
    show_picture(lake, ref)
    return ref


def _rules(config: AssembleConfig) -> AssemblyRules:
    quotas = {group: int(cap) for group, _, cap in (quota.rpartition("=") for quota in config.group_quotas)}
    return AssemblyRules(
        AnswerRules(
            config.min_tokens, config.max_tokens, config.truncated, config.truncation_penalty, config.normalisation
        ),
        PairRules(
            config.strategy,
            config.min_margin,
            config.top_k,
            config.max_pairs_per_prompt,
            config.test_share,
            config.seed,
        ),
        GroupRules(config.max_pairs_per_group, config.min_pairs_per_group, quotas, config.balance),
    )


def _write(assembly: Assembly, writer: VersionWriter) -> None:
    """All shards; a split without pairs has none."""
    for split, n_pairs in assembly.n_pairs.items():
        count = -(-n_pairs // SHARD_ROWS)
        for index, rows in enumerate(assembly.preferences(split, SHARD_ROWS) if count else ()):
            writer.write(Shard("preferences", split, index, count), rows)
    count = max(1, -(-assembly.n_rejected // SHARD_ROWS))
    for index, rows in enumerate(assembly.rejected(SHARD_ROWS)):
        writer.write(Shard("rejected", "train", index, count), rows)


def _stats(assembly: Assembly, groups: Sequence[GroupReport]) -> dict[str, JsonValue]:
    return {
        "pairs": sum(assembly.n_pairs.values()),
        "test_pairs": assembly.n_pairs["test"],
        "prompts_without_pair": cast(JsonValue, _total(group.dropped for group in groups)),
        "answers_not_used": cast(JsonValue, _total(group.unused for group in groups)),
        "pairs_per_group": {group.group: group.pairs for group in groups},
        "groups": cast(JsonValue, [asdict(group) for group in groups]),
    }


def _total(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def _table(groups: Sequence[GroupReport]) -> list[dict[str, Cell]]:
    return [
        {
            "group": group.group,
            "prompts": group.prompts,
            "candidates": group.candidates,
            "pairs": group.pairs,
            "mean_margin": group.mean_margin,
            "prompts_without_pair": _listed(group.dropped),
            "answers_not_used": _listed(group.unused),
        }
        for group in groups
    ]


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in counts.items())
