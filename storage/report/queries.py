"""What a report counts and samples, in SQL. Samples are the rows with the smallest hashes: the same every time."""

from dataclasses import dataclass

import duckdb

from storage.catalog import QueryResult

MAX_POINTS = 1_200
MAX_CUTS = 4
MAX_STEPS = 400

Connection = duckdb.DuckDBPyConnection

_GROUPS = {
    "prompts": """
SELECT split, "group", COUNT(*) AS prompts, COUNT(reference) AS "with reference",
       ROUND(AVG(list_sum(list_transform(messages, lambda m: length(m.content))))) AS "mean characters"
FROM prompts GROUP BY ALL ORDER BY ALL
""",
    "candidates": """
SELECT split, "group", COUNT(DISTINCT prompt_id) AS prompts, COUNT(*) AS candidates,
       COUNT(*) FILTER (finish_reason = 'cut') AS cut, COUNT(*) FILTER (finish_reason = 'length') AS "length",
       COUNT(*) FILTER (status = 'error') AS errors, COUNT(*) FILTER (isfinite(score)) AS scored,
       AVG(score) FILTER (isfinite(score)) AS "mean score", MAX(score) FILTER (isfinite(score)) AS "best score",
       AVG(n_tokens) FILTER (finish_reason <> 'cut') AS "mean tokens"
FROM candidates GROUP BY ALL ORDER BY ALL
""",
    "preferences": """
SELECT split, "group", COUNT(*) AS pairs, AVG(score_margin) FILTER (isfinite(score_margin)) AS "mean margin",
       MIN(score_margin) FILTER (isfinite(score_margin)) AS "smallest margin",
       AVG(length(chosen[-1].content)) AS "mean characters chosen",
       AVG(length(rejected[-1].content)) AS "mean characters rejected"
FROM preferences GROUP BY ALL ORDER BY ALL
""",
}
# The remaining length of a cut answer is unknown: the mean length of the finished answers to its prompt stands for it.
_TOKENS = """
WITH expected AS (
    SELECT split, prompt_id, AVG(n_tokens) AS n FROM candidates
    WHERE finish_reason IN ('eos', 'stop', 'length') GROUP BY ALL
)
SELECT c."group", SUM(c.n_tokens)::BIGINT AS decoded,
       COALESCE(SUM(GREATEST(0.0, e.n - c.n_tokens)) FILTER (c.finish_reason = 'cut'), 0.0) AS saved
FROM candidates AS c LEFT JOIN expected AS e USING (split, prompt_id) GROUP BY ALL ORDER BY decoded DESC, 1
"""
_SCORED_CUTS = """
SELECT prompt_id, candidate_index, "group", score AS final, cut.n_tokens AS n_tokens, cut.score AS partial
FROM (SELECT *, UNNEST(cuts) AS cut FROM candidates WHERE isfinite(score))
WHERE isfinite(cut.score)
"""
_HASH = "md5(concat_ws(':', prompt_id, candidate_index))"
_METRICS = """
SELECT * FROM (
    SELECT "group", metric, first(value) FILTER (model = 'before') AS before,
           first(value) FILTER (model = 'after') AS after, MAX(n) AS n
    FROM metrics GROUP BY ALL
)
ORDER BY "group" <> 'all', "group", metric <> 'truth', metric
"""
_COMPARISON = """
WITH means AS (
    SELECT metric, "group", method, AVG(value), MIN(value), MAX(value), COUNT(*) FROM comparison GROUP BY ALL
)
SELECT * FROM means ORDER BY metric <> 'truth', metric <> 'accuracy', metric, "group" NULLS FIRST, method
"""
_DROPS = """
SELECT COALESCE("group", '(no group)') AS "group", reason, COUNT(*) AS rows FROM rejected GROUP BY ALL ORDER BY ALL
"""
_TRAINING = """
SELECT metric, step, value FROM (
    SELECT *, ROW_NUMBER() OVER (PARTITION BY metric ORDER BY step) - 1 AS place,
           COUNT(*) OVER (PARTITION BY metric) AS n
    FROM training WHERE isfinite(value) AND "group" IS NULL AND held_out IS NOT TRUE
)
WHERE place % CEIL(n / $max_steps)::BIGINT = 0 ORDER BY ALL
"""
# Queries with the columns `group` and `value` for storage.histogram.
SCORES = 'SELECT "group", score AS value FROM candidates'
SCORES_BY_SPLIT = 'SELECT split AS "group", score AS value FROM candidates'
MARGINS = 'SELECT "group", score_margin AS value FROM preferences'
PROMPT_LENGTHS = """
SELECT "group", list_sum(list_transform(messages, lambda m: length(m.content)))::DOUBLE AS value FROM prompts
"""


@dataclass(frozen=True, slots=True)
class Points:
    """A sample of points with their groups, and what holds for all of them."""

    x: list[float]
    y: list[float]
    groups: list[str]
    n: int
    pearson: float | None


def per_group(connection: Connection, table: str) -> QueryResult:
    """One row per split and group; without the split where there is one."""
    result = connection.execute(_GROUPS[table])
    columns, rows = [column[0] for column in result.description or []], result.fetchall()
    if len({row[0] for row in rows}) <= 1:
        return QueryResult(columns[1:], [row[1:] for row in rows])
    return QueryResult(columns, rows)


def tokens(connection: Connection) -> list[tuple[str, int, float]]:
    """(group, tokens decoded, estimated tokens that cuts saved), largest group first."""
    return connection.execute(_TOKENS).fetchall()


def partial_scores(connection: Connection) -> dict[int, Points]:
    """Token count of a cut -> partial (x) against final (y) scores, for the cuts that most answers passed."""
    common = f"SELECT n_tokens, COUNT(*) AS n, corr(partial, final) FROM ({_SCORED_CUTS}) GROUP BY ALL"
    found = connection.execute(f"{common} ORDER BY n DESC, n_tokens LIMIT {MAX_CUTS}").fetchall()
    sample = f'SELECT partial, final, "group" FROM ({_SCORED_CUTS}) WHERE n_tokens = $n ORDER BY {_HASH} LIMIT $limit'
    points = {}
    for n_tokens, n, pearson in sorted(found):
        limit = MAX_POINTS // len(found)
        rows = connection.execute(sample, {"n": n_tokens, "limit": limit}).fetchall()
        points[int(n_tokens)] = _points(rows, n, pearson)
    return points


def lengths(connection: Connection) -> Points:
    """Tokens (x) against score (y) of finished answers."""
    scored = "SELECT * FROM candidates WHERE isfinite(score)"
    n, pearson = connection.execute(f"SELECT COUNT(*), corr(n_tokens, score) FROM ({scored})").fetchall()[0]
    sample = f'SELECT n_tokens, score, "group" FROM ({scored}) ORDER BY {_HASH}, split LIMIT {MAX_POINTS}'
    return _points(connection.execute(sample).fetchall(), n, pearson)


def metrics(connection: Connection) -> list[tuple[str, str, float | None, float | None, int]]:
    """(group, metric, before, after, answers); all groups first, truth before other metrics."""
    return connection.execute(_METRICS).fetchall()


def comparison(connection: Connection) -> list[tuple[str, str | None, str, float, float, float, int]]:
    """(metric, group, method, mean, lowest, highest, seeds); the group is None for all together."""
    return connection.execute(_COMPARISON).fetchall()


def drop_counts(connection: Connection) -> list[tuple[str, str, int]]:
    """(group, reason, rows) of the rejected table."""
    return connection.execute(_DROPS).fetchall()


def training_curves(connection: Connection) -> dict[str, list[tuple[int, float]]]:
    """Metric -> (step, value); of a long training every k-th entry."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for metric, step, value in connection.execute(_TRAINING, {"max_steps": MAX_STEPS}).fetchall():
        curves.setdefault(str(metric), []).append((step, value))
    return curves


def _points(rows: list[tuple[float, float, str]], n: int, pearson: float | None) -> Points:
    # A correlation of constants is no number.
    known = pearson if pearson is not None and pearson == pearson else None
    return Points([float(x) for x, _, _ in rows], [y for _, y, _ in rows], [str(group) for *_, group in rows], n, known)
