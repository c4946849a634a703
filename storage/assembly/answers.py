"""Which answers take part in pairs, at what score, and in what order."""

import math
from dataclasses import asdict

import duckdb
import numpy as np
import pyarrow as pa

from storage.assembly.rules import AnswerRules
from storage.errors import LakeError

# Only finished answers take part: cut text is neither a fair winner nor a fair loser. NaN would win every comparison,
# so a score that is not a finite number counts as none. Texts are left where they are until pairs are known.
_ANSWERS = """
CREATE TEMP TABLE answers AS
SELECT prompt_id, "group", candidate_index, n_tokens, md5_number(response) AS digest,
       score - CASE WHEN finish_reason = 'length' AND $truncated = 'penalise' THEN $truncation_penalty ELSE 0 END
           AS score,
       CASE WHEN status <> 'ok' THEN 'error'
            WHEN finish_reason = 'cut' THEN 'cut'
            WHEN finish_reason NOT IN ('eos', 'stop', 'length') THEN 'unfinished'
            WHEN score IS NULL OR NOT isfinite(score) THEN 'no_score'
            WHEN finish_reason = 'length' AND $truncated = 'drop' THEN 'truncated'
            WHEN n_tokens < $min_tokens THEN 'too_short'
            WHEN n_tokens > $max_tokens THEN 'too_long'
       END AS reason
FROM candidates
"""

_TWICE = """
SELECT prompt_id, candidate_index FROM answers GROUP BY ALL HAVING COUNT(*) > 1 ORDER BY ALL LIMIT 1
"""

_IN_TWO_GROUPS = """
SELECT prompt_id FROM answers GROUP BY prompt_id HAVING COUNT(DISTINCT "group") > 1 ORDER BY ALL LIMIT 1
"""

# Equal texts of a prompt count once. place: 1 is the best; ties go to the lower index.
_RANKED = """
CREATE TEMP TABLE ranked AS
WITH usable AS (SELECT * FROM answers WHERE reason IS NULL),
scored AS (
    SELECT u.* REPLACE ((u.score - coalesce(s.centre, 0)) / coalesce(s.scale, 1) AS score)
    FROM usable AS u LEFT JOIN scales AS s USING ("group")
),
once AS (
    SELECT *, ROW_NUMBER() OVER (PARTITION BY prompt_id, digest ORDER BY score DESC, candidate_index) AS copy
    FROM scored
)
SELECT prompt_id, "group", candidate_index, score,
       ROW_NUMBER() OVER (PARTITION BY prompt_id ORDER BY score DESC, candidate_index) AS place,
       COUNT(*) OVER (PARTITION BY prompt_id) AS n_answers
FROM once WHERE copy = 1
"""

_SCALES = pa.schema([("group", pa.string()), ("centre", pa.float64()), ("scale", pa.float64())])


def judge_answers(connection: duckdb.DuckDBPyConnection, rules: AnswerRules) -> None:
    """Make `answers` (each with the reason why it takes no part, or none) and `ranked` from `candidates`.

    LakeError for candidates that contradict themselves.
    """
    parameters = {name: value for name, value in asdict(rules).items() if name != "normalisation"}
    connection.execute(_ANSWERS, parameters)
    for prompt_id, index in connection.execute(_TWICE).fetchall():
        raise LakeError(f"candidates have two rows for candidate {index} of prompt {prompt_id}; generate them again")
    for (prompt_id,) in connection.execute(_IN_TWO_GROUPS).fetchall():
        raise LakeError(f"candidates of prompt {prompt_id} name two groups; generate them again")
    scales = _scales(connection) if rules.normalisation == "zscore" else []
    connection.register("scales", pa.Table.from_pylist(scales, schema=_SCALES))
    connection.execute(_RANKED)


def _scales(connection: duckdb.DuckDBPyConnection) -> list[dict[str, object]]:
    """Mean and standard deviation of every group's scores, exact sums, so that no order of addition shows."""
    found = connection.execute('SELECT DISTINCT "group" FROM answers WHERE reason IS NULL ORDER BY ALL').fetchall()
    scales: list[dict[str, object]] = []
    for (group,) in found:
        query = 'SELECT score FROM answers WHERE reason IS NULL AND "group" = $group'
        scores: np.ndarray = connection.execute(query, {"group": group}).fetchnumpy()["score"]
        centre = math.fsum(scores) / len(scores)
        scale = math.sqrt(math.fsum((scores - centre) ** 2) / len(scores))
        scales.append({"group": group, "centre": centre, "scale": scale or 1.0})
    return scales
