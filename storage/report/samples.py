"""A few rows for people to read: the ones with the smallest hashes, every group in turn."""

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb

MAX_SAMPLES = 6
MAX_CHARACTERS = 1_500

_PICK = """
SELECT prompt_id FROM (
    SELECT prompt_id, "group", ROW_NUMBER() OVER (PARTITION BY "group" ORDER BY md5(prompt_id)) AS turn
    FROM (SELECT DISTINCT prompt_id, "group" FROM {table} {where})
)
ORDER BY turn, "group" LIMIT $limit
"""
_PAIRS = """
SELECT prompt_id, "group", prompt, chosen, rejected, score_chosen, score_rejected, score_margin FROM preferences
WHERE list_contains($ids, prompt_id) ORDER BY "group", prompt_id, chosen_index, rejected_index LIMIT $limit
"""
_ANSWERS = """
SELECT prompt_id, "group", first(response ORDER BY score DESC, candidate_index) AS best,
       first(response ORDER BY score ASC, candidate_index DESC) AS worst, MAX(score), MIN(score), COUNT(*)
FROM candidates WHERE list_contains($ids, prompt_id) AND isfinite(score) GROUP BY ALL ORDER BY "group", prompt_id
"""
_PROMPTS = """
SELECT prompt_id, "group", messages FROM prompts WHERE list_contains($ids, prompt_id) ORDER BY "group", prompt_id
"""


@dataclass(frozen=True, slots=True)
class Side:
    """One text with its heading."""

    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, and up to two texts side by side."""

    group: str
    title: str
    prompt: str
    sides: tuple[Side, ...]


def pairs(connection: duckdb.DuckDBPyConnection) -> list[Sample]:
    """Pairs of a preferences table."""
    ids = _pick(connection, "preferences")
    rows = connection.execute(_PAIRS, {"ids": ids, "limit": MAX_SAMPLES}).fetchall()
    return [
        Sample(
            group,
            f"margin {margin:.4g}",
            _conversation(prompt),
            (
                Side(f"chosen, score {better:.4g}", _conversation(chosen)),
                Side(f"rejected, score {worse:.4g}", _conversation(rejected)),
            ),
        )
        for _, group, prompt, chosen, rejected, better, worse, margin in rows
    ]


def answers(connection: duckdb.DuckDBPyConnection) -> list[Sample]:
    """Best and worst finished answers of a few prompts."""
    ids = _pick(connection, "candidates", "WHERE isfinite(score)")
    texts = {row[0]: _conversation(row[2]) for row in connection.execute(_PROMPTS, {"ids": ids}).fetchall()}
    rows = connection.execute(_ANSWERS, {"ids": ids}).fetchall()
    return [
        Sample(
            group,
            f"{n} scored answers",
            texts.get(prompt_id, f"(prompt {prompt_id} is not in this lake)"),
            (Side(f"best, score {high:.4g}", _short(best)), Side(f"worst, score {low:.4g}", _short(worst))),
        )
        for prompt_id, group, best, worst, high, low, n in rows
    ]


def prompts(connection: duckdb.DuckDBPyConnection) -> list[Sample]:
    """A few prompts."""
    rows = connection.execute(_PROMPTS, {"ids": _pick(connection, "prompts")}).fetchall()
    return [Sample(group, "", _conversation(messages), ()) for _, group, messages in rows]


def _pick(connection: duckdb.DuckDBPyConnection, table: str, where: str = "") -> list[str]:
    found = connection.execute(_PICK.format(table=table, where=where), {"limit": MAX_SAMPLES}).fetchall()
    return [str(row[0]) for row in found]


def _conversation(messages: Sequence[dict[str, str]]) -> str:
    """One message as it is; several with their roles."""
    if len(messages) == 1:
        return _short(messages[0]["content"])
    return _short("\n\n".join(f"{message['role']}: {message['content']}" for message in messages))


def _short(text: str) -> str:
    more = len(text) - MAX_CHARACTERS
    return text if more <= 0 else f"{text[:MAX_CHARACTERS]}\n[{more} more characters]"
