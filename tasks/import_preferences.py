"""Preference data that is there already into the lake: its pairs, who prefers them, and its prompts."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import cast

from prefect import task
from pydantic import JsonValue

from storage.lake import DatasetRef, Lake
from storage.schema import to_table
from storage.splits import split_of
from storage.writer import Shard
from tasks.artifacts import Cell, show_stage
from tasks.errors import InputError
from tasks.importers.collect import STAGE, Collected, collect, contradictions
from tasks.importers.records import Pair
from tasks.importers.sources import identity, read_source
from tasks.retries import RETRIES
from tasks.rows import rejected_row
from tasks.settings_import import ImportConfig
from tasks.versions import Step

SPLITS = ("train", "test")


def prepare(config: ImportConfig) -> Step:
    """The step, with the source's identity."""
    return Step(STAGE, "preferences", config.name, config, {"source": identity(config)})


@task(name="import", persist_result=False, **RETRIES)
def import_preferences(step: Step, lake_root: str) -> DatasetRef:
    """Read, check and publish the pairs, and before them their prompts as prompts/NAME."""
    config, lake = step.config, Lake.open(lake_root)
    assert isinstance(config, ImportConfig)
    found = collect(read_source(config), config)
    if not found.pairs:
        reasons = Counter(f"{row['reason']} ({row['detail']})" for row in found.rejected).most_common(1)
        shown = f"{reasons[0][0]}" if reasons else "the source is empty"
        raise InputError(f'source "{config.source}" gives no pair; most often: {shown}')
    prompts = _publish_prompts(step, lake, found.pairs)
    writer = step.writer(lake)
    for split in SPLITS:
        rows = [preference_row(pair) for pair in found.pairs if _split(pair, config) == split]
        writer.write(Shard("preferences", split, 0, 1), to_table("preferences", rows))
    writer.write(Shard("rejected", "train", 0, 1), to_table("rejected", found.rejected))
    groups, stats = _per_group(found.pairs, config), _stats(found, config)
    stored = stats | {"groups": cast(JsonValue, groups)}
    ref = writer.commit(step.provenance(stored, {"prompts": str(prompts)}))
    show_stage(ref, stats, groups)
    return ref


def preference_row(pair: Pair) -> dict[str, object]:
    """A row of the table; what only candidates have stays null."""
    return {
        "prompt": pair.messages,
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
        "prompt_id": pair.prompt_id,
        "group": pair.group,
        "score_chosen": pair.score_chosen,
        "score_rejected": pair.score_rejected,
        "score_margin": pair.margin,
        "strategy": pair.strategy,
        "chosen_index": None,
        "rejected_index": None,
        "policy_logp_ref_chosen": None,
        "policy_logp_ref_rejected": None,
        "n_votes": pair.n_votes,
        "agreement": pair.agreement,
        "annotator": pair.annotator,
    }


def _publish_prompts(step: Step, lake: Lake, pairs: Sequence[Pair]) -> DatasetRef:
    """prompts/NAME, so that `evaluate` and `generate` can follow; a prompt of two groups is there once."""
    config = step.config
    assert isinstance(config, ImportConfig)
    once, others = _distinct(pairs)
    own = Step(step.stage, "prompts", step.name, config, step.inputs)
    writer = own.writer(lake)
    for split in SPLITS:
        rows = [_prompt_row(pair, config) for pair in once if _split(pair, config) == split]
        writer.write(Shard("prompts", split, 0, 1), to_table("prompts", rows))
    writer.write(Shard("rejected", "train", 0, 1), to_table("rejected", [_other_group_row(pair) for pair in others]))
    counts = Counter(_split(pair, config) for pair in once)
    stats: dict[str, JsonValue] = {
        "prompts": counts["train"],
        "heldout": counts["test"],
        "rejected": {"duplicate_in_other_group": len(others)} if others else {},
    }
    return writer.commit(own.provenance(stats))


def _distinct(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """(a pair for each prompt, a pair for each further group that has the same prompt)."""
    first: dict[str, Pair] = {}
    others: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        if first.setdefault(pair.prompt_id, pair).group != pair.group:
            others.setdefault((pair.prompt_id, pair.group), pair)
    return list(first.values()), list(others.values())


def _prompt_row(pair: Pair, config: ImportConfig) -> dict[str, object]:
    return {
        "prompt_id": pair.prompt_id,
        "messages": pair.messages,
        "group": pair.group,
        "reference": None,
        "source": config.source,
        "license": config.license,
    }


def _other_group_row(pair: Pair) -> dict[str, object]:
    detail = "the prompt is there under another group; its pairs are kept"
    return rejected_row(STAGE, "duplicate_in_other_group", detail, pair.group) | {"prompt_id": pair.prompt_id}


def _split(pair: Pair, config: ImportConfig) -> str:
    return split_of(pair.prompt_id, config.test_share, config.seed)


def _stats(found: Collected, config: ImportConfig) -> dict[str, JsonValue]:
    splits = Counter(_split(pair, config) for pair in found.pairs)
    stats: dict[str, JsonValue] = {
        "rows": found.rows_per_file.total(),
        "pairs": splits["train"],
        "test_pairs": splits["test"],
        "rejected": dict[str, JsonValue](Counter(str(row["reason"]) for row in found.rejected).most_common()),
    }
    if config.layout == "annotators":
        stats["judgements"] = found.n_judgements
    if both_ways := contradictions(found.pairs):
        stats["contradictions"] = both_ways
    if len(found.rows_per_file) > 1:
        stats["files"] = [{"file": file, "rows": n} for file, n in sorted(found.rows_per_file.items())]
    return stats


def _per_group(pairs: Sequence[Pair], config: ImportConfig) -> list[dict[str, Cell]]:
    rows: list[dict[str, Cell]] = []
    for group in sorted({pair.group for pair in pairs}):
        own = [pair for pair in pairs if pair.group == group]
        splits = Counter(_split(pair, config) for pair in own)
        row: dict[str, Cell] = {"group": group, "pairs": splits["train"], "test_pairs": splits["test"]}
        row["prompts"] = len({pair.prompt_id for pair in own})
        if agreements := [pair.agreement for pair in own if pair.agreement is not None]:
            row["mean_agreement"] = round(fmean(agreements), 4)
        if margins := [pair.margin for pair in own if pair.margin is not None]:
            row["mean_margin"] = round(fmean(margins), 4)
        rows.append(row)
    return rows
