"""Between the lake's tables and the runtime's records."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import pyarrow as pa

from storage.schema import to_table
from storage.writer import Shard, VersionWriter

if TYPE_CHECKING:
    from runtime.alignment.report import Point
    from runtime.records import Candidate, Message, Prompt


def prompts_of(table: pa.Table) -> "list[Prompt]":
    """Rows of a prompts table as records."""
    from runtime.records import Prompt

    return [
        Prompt(row["prompt_id"], messages_of(row["messages"]), row["group"], row["reference"])
        for row in table.to_pylist()
    ]


def messages_of(rows: Sequence[Mapping[str, str]]) -> "tuple[Message, ...]":
    """A column of message structs as records."""
    from runtime.records import Message

    return tuple(Message(row["role"], row["content"]) for row in rows)


def candidates_table(
    prompts: "Sequence[Prompt]", answers: "Sequence[Sequence[Candidate]]", generator: str, seed: int
) -> pa.Table:
    """Candidates of several prompts as a table without scores."""
    rows: list[dict[str, object]] = [
        {
            "prompt_id": c.prompt_id,
            "group": prompt.group,
            "candidate_index": c.candidate_index,
            "response": c.response,
            "token_ids": list(c.token_ids),
            "n_tokens": c.n_tokens,
            "finish_reason": c.finish_reason,
            "cut_at_token": c.cut_at_token,
            "cuts": [{"n_tokens": cut.n_tokens, "score": cut.score, "kept": cut.kept} for cut in c.cuts],
            "score": None,
            "scores": [],
            "generator": generator,
            "seed": seed,
            "status": c.status,
            "error": c.error,
        }
        for prompt, candidates in zip(prompts, answers, strict=True)
        for c in candidates
    ]
    return to_table("candidates", rows)


def candidate_shards(writer: VersionWriter, count: int) -> Iterator[pa.Table]:
    """All training shards of a version that is being written, one by one; every one of them must be there."""
    for index in range(count):
        found = writer.find(Shard("candidates", "train", index, count))
        assert found is not None, f"shard {index} of {count}"
        yield found


def rejected_row(stage: str, reason: str, detail: str, group: str | None) -> dict[str, object]:
    """A row of `rejected` that is about no row of the source and no prompt yet."""
    return {"stage": stage, "row": None, "prompt_id": None, "group": group, "reason": reason, "detail": detail}


def rows_of(table: pa.Table) -> list[dict[str, object]]:
    """A table as dictionaries."""
    return cast(list[dict[str, object]], table.to_pylist())


def add_score(row: dict[str, object], scorer: str, value: float) -> None:
    """Put one scorer's value among the scores of a candidate, in place of an earlier one."""
    others = [entry for entry in scores_of(row) if entry["scorer"] != scorer]
    row["scores"] = [*others, {"scorer": scorer, "value": value}]


def scores_of(row: Mapping[str, object]) -> list[dict[str, object]]:
    """All scores of a candidate, as {scorer, value}."""
    return cast(list[dict[str, object]], row["scores"])


def training_table(points: "Sequence[Point]") -> pa.Table:
    """The figures of a training as a table."""
    return to_table(
        "training",
        [
            {"step": p.step, "metric": p.metric, "value": p.value, "group": p.group, "held_out": p.split == "test"}
            for p in points
        ],
    )
