"""One assembly: candidates and prompts in, pairs, rejected rows and a report out, in bounded memory."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads

from storage.assembly.answers import judge_answers
from storage.assembly.pairing import explain_drops, propose_pairs
from storage.assembly.quotas import apply_quotas
from storage.assembly.rules import AssemblyRules, PairRules
from storage.schema import checked
from storage.splits import split_of

MEMORY_LIMIT = "1GB"  # what does not fit is spilled to disk
BATCH_ROWS = 10_000

# The few answers that pairs need are fetched in one pass over the candidates.
_TEXTS = """
CREATE TEMP TABLE texts AS
SELECT c.prompt_id, c.candidate_index, c.response, c.scores
FROM candidates AS c
SEMI JOIN (
    SELECT prompt_id, chosen_index AS candidate_index FROM kept
    UNION SELECT prompt_id, rejected_index FROM kept
) AS needed ON needed.prompt_id = c.prompt_id AND needed.candidate_index = c.candidate_index
"""

# Scorers are raters: where at least two judged both answers, how many did, and the share of them that is for `chosen`.
_PREFERENCES = """
WITH pairs AS (
    SELECT q.*, p.messages, c.response AS chosen, r.response AS rejected,
           list_transform(
               list_filter(c.scores, lambda s: list_contains(list_transform(r.scores, lambda t: t.scorer), s.scorer)),
               lambda s: s.value > list_filter(r.scores, lambda t: t.scorer = s.scorer)[1].value
           ) AS votes
    FROM kept AS q
    JOIN prompts AS p ON p.prompt_id = q.prompt_id
    JOIN texts AS c ON c.prompt_id = q.prompt_id AND c.candidate_index = q.chosen_index
    JOIN texts AS r ON r.prompt_id = q.prompt_id AND r.candidate_index = q.rejected_index
    WHERE q.split = $split
)
SELECT messages AS prompt,
       [{'role': 'assistant', 'content': chosen}] AS chosen,
       [{'role': 'assistant', 'content': rejected}] AS rejected,
       prompt_id, "group", score_chosen, score_rejected, score_margin, $strategy AS strategy,
       chosen_index, rejected_index,
       NULL::DOUBLE AS policy_logp_ref_chosen, NULL::DOUBLE AS policy_logp_ref_rejected,
       CASE WHEN len(votes) > 1 THEN len(votes)::INTEGER END AS n_votes,
       CASE WHEN len(votes) > 1 THEN len(list_filter(votes, lambda v: v)) / len(votes) END AS agreement,
       NULL::VARCHAR AS annotator
FROM pairs
ORDER BY prompt_id, chosen_index, rejected_index
"""

# Prompts without a pair, and the answers that the user's own bounds removed.
_REJECTED = """
SELECT 'assemble' AS stage, NULL::BIGINT AS "row", prompt_id, "group", reason, detail FROM dropped
UNION ALL
SELECT 'assemble', candidate_index::BIGINT, prompt_id, "group", reason, concat(n_tokens, ' tokens')
FROM answers WHERE reason IN ('truncated', 'too_short', 'too_long')
ORDER BY prompt_id, "row" NULLS FIRST, reason
"""

_COUNTS = "SELECT split, COUNT(*) FROM kept GROUP BY ALL ORDER BY ALL"

_GROUPS = """
WITH a AS (SELECT "group", COUNT(DISTINCT prompt_id) AS prompts, COUNT(*) AS candidates FROM answers GROUP BY ALL),
k AS (
    SELECT "group", COUNT(*) AS pairs, COUNT(*) FILTER (split = 'test') AS test_pairs, AVG(score_margin) AS margin
    FROM kept GROUP BY ALL
)
SELECT a."group", a.prompts, a.candidates, coalesce(k.pairs, 0), coalesce(k.test_pairs, 0), round(k.margin, 6)
FROM a LEFT JOIN k USING ("group") ORDER BY ALL
"""
_DROP_COUNTS = 'SELECT "group", reason, COUNT(*) FROM {table} WHERE reason IS NOT NULL GROUP BY ALL ORDER BY ALL'


@dataclass(frozen=True, slots=True)
class GroupReport:
    """What became of one group. dropped: prompts without a pair by reason; unused: answers by reason."""

    group: str
    prompts: int
    candidates: int
    pairs: int
    test_pairs: int
    mean_margin: float | None
    dropped: dict[str, int]
    unused: dict[str, int]


class Assembly:
    """The result, still in the database; see `assembled`. One iteration at a time."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, rules: AssemblyRules) -> None:
        self.connection, self.rules = connection, rules
        self.n_pairs: dict[str, int] = {"train": 0, "test": 0} | dict(connection.execute(_COUNTS).fetchall())

    def preferences(self, split: str, shard_rows: int) -> Iterator[pa.Table]:
        """Pairs of a split in the order of prompt_id, as tables of `shard_rows` rows; one empty table if none."""
        parameters = {"strategy": self.rules.pairs.strategy, "split": split}
        yield from self._tables("preferences", _PREFERENCES, parameters, shard_rows)

    def rejected(self, shard_rows: int) -> Iterator[pa.Table]:
        """Rows of what gave no pair, as tables of `shard_rows` rows; one empty table if none."""
        yield from self._tables("rejected", _REJECTED, {}, shard_rows)

    @property
    def n_rejected(self) -> int:
        """Rows of `rejected`."""
        ((n,),) = self.connection.execute(f"SELECT COUNT(*) FROM ({_REJECTED})").fetchall()
        return int(n)

    def groups(self) -> list[GroupReport]:
        """One report per group, in order of their names."""
        dropped, unused = self._reasons("dropped"), self._reasons("answers")
        found = self.connection.execute(_GROUPS).fetchall()
        return [GroupReport(*(*row, dropped.get(row[0], {}), unused.get(row[0], {}))) for row in found]

    def _reasons(self, table: str) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for group, reason, n in self.connection.execute(_DROP_COUNTS.format(table=table)).fetchall():
            found.setdefault(group, {})[reason] = n
        return found

    def _tables(self, table: str, query: str, parameters: Mapping[str, object], shard_rows: int) -> Iterator[pa.Table]:
        reader = self.connection.sql(query, params=dict(parameters)).to_arrow_reader(min(BATCH_ROWS, shard_rows))
        waiting: list[pa.RecordBatch] = []
        n_waiting = n_given = 0
        for batch in reader:
            while batch.num_rows:
                part = batch.slice(0, shard_rows - n_waiting)
                batch = batch.slice(part.num_rows)
                waiting.append(part)
                n_waiting += part.num_rows
                if n_waiting == shard_rows:
                    yield checked(table, pa.Table.from_batches(waiting))
                    waiting, n_waiting, n_given = [], 0, n_given + 1
        if waiting or not n_given:
            yield checked(table, pa.Table.from_batches(waiting, reader.schema))


@contextmanager
def assembled(
    candidates: pads.Dataset,
    prompts: pads.Dataset,
    rules: AssemblyRules,
    screened: Sequence[Mapping[str, str]] = (),
    spill: Path | None = None,
) -> Iterator[Assembly]:
    """Pair the answers of every prompt; deterministic, whatever the order of the rows.

    screened: prompts that may not be used, as {prompt_id, reason, detail}. spill: folder for what exceeds memory.
    Every prompt of the candidates gives pairs or exactly one rejected row with `row` empty.
    """
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": MEMORY_LIMIT,
        "threads": str(min(2, os.cpu_count() or 1)),
    }
    if spill is not None:
        config["temp_directory"] = str(spill)
    with duckdb.connect(config=config) as connection:
        connection.execute("SET preserve_insertion_order = false")
        connection.register("candidates", candidates)
        connection.register("prompts", prompts)
        schema = pa.schema([(name, pa.string()) for name in ("prompt_id", "reason", "detail")])
        connection.register("screened", pa.Table.from_pylist([dict(row) for row in screened], schema=schema))
        judge_answers(connection, rules.answers)
        _split(connection, rules.pairs)
        propose_pairs(connection, rules.pairs)
        apply_quotas(connection, rules.groups)
        explain_drops(connection, rules.pairs)
        connection.execute(_TEXTS)
        yield Assembly(connection, rules)


def _split(connection: duckdb.DuckDBPyConnection, rules: PairRules) -> None:
    """Make `splits`: the split of every prompt."""
    names = [name for (name,) in connection.execute("SELECT DISTINCT prompt_id FROM ranked ORDER BY ALL").fetchall()]
    splits = [split_of(name, rules.test_share, rules.seed) for name in names]
    table = pa.table({"prompt_id": pa.array(names, pa.string()), "split": pa.array(splits, pa.string())})
    connection.register("splits", table)
