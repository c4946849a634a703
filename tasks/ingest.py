"""Raw rows to prompts: normalised, grouped, de-duplicated, split; rows that cannot be used are kept with a reason."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

from prefect import task
from pydantic import JsonValue

from storage.lake import DatasetRef, Lake
from storage.schema import to_table
from storage.writer import Shard
from tasks.artifacts import show_stage
from tasks.errors import ConfigError, InputError
from tasks.ingest_readers import RawRow, Unreadable, read_rows, source_identity
from tasks.messages import Unusable, clean_prompt, prompt_id_of
from tasks.pictures import show_picture
from tasks.retries import RETRIES
from tasks.rows import rejected_row
from tasks.settings import IngestConfig
from tasks.versions import Step

TEXT_COLUMNS = ("prompt", "text", "instruction", "question")
NO_GROUP = "all"


@dataclass(slots=True)
class Ingested:
    """Rows of the tables `prompts` (by split) and `rejected`, and what was counted on the way."""

    prompts: dict[str, list[dict[str, object]]] = field(default_factory=lambda: {"train": [], "test": []})
    rejected: list[dict[str, object]] = field(default_factory=list)
    n_rows: int = 0
    n_over_limit: Counter[str] = field(default_factory=Counter)


def prepare(config: IngestConfig) -> Step:
    """The step, with the source's identity."""
    return Step("ingest", "prompts", config.name, config, {"source": source_identity(config)})


@task(name="ingest", persist_result=False, **RETRIES)
def ingest(step: Step, lake_root: str) -> DatasetRef:
    """Read, clean and publish the prompts."""
    config = step.config
    assert isinstance(config, IngestConfig)
    found = clean(read_rows(config), config)
    if not any(found.prompts.values()):
        reasons = ", ".join(sorted({str(row["reason"]) for row in found.rejected})) or "the source is empty"
        raise InputError(f'source "{config.source}" gives no usable prompt: {reasons}')
    lake = Lake.open(lake_root)
    writer = step.writer(lake)
    for split, rows in found.prompts.items():
        writer.write(Shard("prompts", split, 0, 1), to_table("prompts", rows))
    writer.write(Shard("rejected", "train", 0, 1), to_table("rejected", found.rejected))
    stats: dict[str, JsonValue] = {
        "rows": found.n_rows,
        "prompts": len(found.prompts["train"]),
        "heldout": len(found.prompts["test"]),
        "rejected": dict[str, JsonValue](Counter(str(row["reason"]) for row in found.rejected)),
        "over_limit": dict[str, JsonValue](found.n_over_limit),
    }
    groups = _per_group(found)
    ref = writer.commit(step.provenance(stats | {"groups": cast(JsonValue, groups)}))
    show_stage(ref, stats, groups)
    show_picture(lake, ref)
    return ref


def clean(rows: Iterable[RawRow], config: IngestConfig) -> Ingested:
    """Apply normalisation, groups, de-duplication, split and limits, in this order."""
    found = Ingested()
    seen: dict[str, str] = {}
    columns: set[str] = set()
    rules = _compiled(config.group_rules)
    for number, row in rows:
        found.n_rows += 1
        group = None
        try:
            if isinstance(row, Unreadable):
                raise Unusable("unreadable", row.detail)
            columns.update(row)
            messages = clean_prompt(_raw_messages(row, config), config.system_prompt)
            group = _group(row, messages, config, rules)
            prompt_id = prompt_id_of(messages)
            if prompt_id in seen:
                raise Unusable("duplicate" if seen[prompt_id] == group else "duplicate_in_other_group", prompt_id)
            seen[prompt_id] = group
            _place(found, _prompt(row, (prompt_id, messages, group), config), config)
        except Unusable as error:
            reason, detail = error.args
            about = {"row": number, "prompt_id": detail if reason.startswith("duplicate") else None}
            found.rejected.append(rejected_row("ingest", reason, detail, group) | about)
    _check_columns(columns, config, found)
    return found


def _place(found: Ingested, prompt: dict[str, object], config: IngestConfig) -> None:
    """Into its split, unless that is full."""
    position = int(str(prompt["prompt_id"])[:8], 16) / 2**32
    split = "test" if position < config.heldout_fraction else "train"
    limit = config.max_heldout if split == "test" else config.max_prompts
    if limit is not None and len(found.prompts[split]) >= limit:
        found.n_over_limit[split] += 1
    else:
        found.prompts[split].append(prompt)


def _raw_messages(row: Mapping[str, object], config: IngestConfig) -> list[object]:
    column = config.messages_column or ("messages" if "messages" in row and not config.prompt_column else None)
    if column:
        value = row.get(column)
        if not isinstance(value, list) or not value:
            raise Unusable("missing_value", f'column "{column}" has no list of messages')
        return value
    text_column = config.prompt_column or next((name for name in TEXT_COLUMNS if name in row), None)
    value = row.get(text_column) if text_column else None
    if isinstance(value, list) and not config.prompt_column and value:
        return value  # a conversational `prompt` column
    if not isinstance(value, str):
        raise Unusable("missing_value", f'column "{text_column or "messages"}" has no text')
    return [{"role": "user", "content": value}]


def _group(
    row: Mapping[str, object],
    messages: list[dict[str, str]],
    config: IngestConfig,
    rules: list[tuple[re.Pattern[str], str]],
) -> str:
    if config.group_constant:
        return config.group_constant
    if rules:
        text = "\n".join(message["content"] for message in messages)
        matched = next((group for pattern, group in rules if pattern.search(text)), None)
        if matched is None:
            raise Unusable("no_group", "no group rule matches")
        return matched
    column = config.group_column or ("group" if "group" in row else None)
    if column is None:
        return NO_GROUP
    value = row.get(column)
    if value is None or not str(value).strip():
        raise Unusable("no_group", f'column "{column}" is empty')
    return str(value).strip()


def _prompt(
    row: Mapping[str, object], found: tuple[str, list[dict[str, str]], str], config: IngestConfig
) -> dict[str, object]:
    prompt_id, messages, group = found
    reference = row.get(config.reference_column or "reference")
    return {
        "prompt_id": prompt_id,
        "messages": messages,
        "group": group,
        "reference": None if reference is None else str(reference),
        "source": config.source,
        "license": config.license,
    }


def _compiled(rules: Iterable[str]) -> list[tuple[re.Pattern[str], str]]:
    compiled = []
    for rule in rules:
        pattern, equals, group = rule.rpartition("=")
        try:
            if not equals or not group.strip():
                raise ConfigError(f'group rule "{rule}": write regular-expression=group')
            compiled.append((re.compile(pattern), group.strip()))
        except re.error as error:
            raise ConfigError(f'group rule "{rule}" is not a regular expression: {error}') from error
    return compiled


def _check_columns(columns: set[str], config: IngestConfig, found: Ingested) -> None:
    """A configured column that no row has is a mistake, not a reason to reject every row."""
    configured = (config.messages_column, config.prompt_column, config.group_column, config.reference_column)
    for column in configured:
        if column and column not in columns and found.n_rows:
            have = ", ".join(sorted(columns)) or "none"
            raise InputError(f'source "{config.source}" has no column "{column}"; it has {have}')


def _per_group(found: Ingested) -> list[dict[str, str | int | float | None]]:
    counts = {split: Counter(str(row["group"]) for row in rows) for split, rows in found.prompts.items()}
    groups = sorted(set(counts["train"]) | set(counts["test"]))
    return [{"group": g, "prompts": counts["train"][g], "heldout": counts["test"][g]} for g in groups]
