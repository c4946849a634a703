"""Preference pairs out of scored candidates, in SQL: who is chosen, who is rejected, and why a prompt gives no pair."""

from dataclasses import dataclass
from typing import Literal

import duckdb
import pyarrow as pa

from storage.schema import checked

Strategy = Literal["best_vs_worst", "best_vs_random", "best_vs_second"]


@dataclass(frozen=True, slots=True)
class PairRules:
    """Which pairs are made. A pair needs a margin above `min_margin`; ties never pair."""

    strategy: Strategy = "best_vs_worst"
    min_margin: float = 0.0
    max_pairs_per_group: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class PairResult:
    """Pairs, and one rejected row for each prompt without one."""

    preferences: pa.Table
    rejected: pa.Table


# Only finished answers take part: truncated text is neither a fair winner nor a fair loser. NaN would win every
# comparison, so a score that is not a finite number counts as none.
_USABLE = """
CREATE TEMP TABLE usable AS
SELECT c.prompt_id, c."group", c.candidate_index, c.response, c.score,
       ROW_NUMBER() OVER (PARTITION BY c.prompt_id ORDER BY c.score DESC, c.candidate_index) AS place,
       COUNT(*) OVER (PARTITION BY c.prompt_id) AS n_usable,
       md5(concat_ws(':', $seed, c.prompt_id, c.candidate_index)) AS draw
FROM candidates AS c
WHERE c.status = 'ok' AND isfinite(c.score) AND c.finish_reason IN ('eos', 'stop', 'length')
"""

# The order in which the runners-up are considered; the first of them is the rejected answer.
_ORDER_BY: dict[Strategy, str] = {
    "best_vs_worst": "score ASC, candidate_index DESC",
    "best_vs_second": "score DESC, candidate_index ASC",
    "best_vs_random": "draw ASC",
}

_PAIRED = """
CREATE TEMP TABLE paired AS
WITH prompt_ids AS (SELECT DISTINCT prompt_id, "group" FROM candidates),
best AS (SELECT * FROM usable WHERE place = 1),
other AS (
    SELECT *, ROW_NUMBER() OVER (PARTITION BY prompt_id ORDER BY {order_by}) AS turn
    FROM usable WHERE place > 1
),
judged AS (
    SELECT i.prompt_id, i."group", b.candidate_index AS chosen_index, o.candidate_index AS rejected_index,
           b.response AS chosen, o.response AS rejected, b.score AS score_chosen, o.score AS score_rejected,
           b.score - o.score AS score_margin, coalesce(b.n_usable, 0) AS n_usable,
           CASE WHEN i.prompt_id NOT IN (SELECT prompt_id FROM prompts) THEN 'unknown_prompt'
                WHEN o.score IS NULL THEN 'too_few_candidates'
                WHEN b.score = o.score THEN 'tie'
                WHEN b.response = o.response THEN 'duplicate_response'
                WHEN NOT b.score - o.score > $min_margin THEN 'margin'
           END AS reason
    FROM prompt_ids AS i
    LEFT JOIN best AS b USING (prompt_id)
    LEFT JOIN other AS o ON o.prompt_id = i.prompt_id AND o.turn = 1
)
SELECT *, ROW_NUMBER() OVER (
    PARTITION BY "group", reason IS NULL ORDER BY md5(concat_ws(':', $seed, prompt_id))
) AS turn_in_group
FROM judged
"""

_PREFERENCES = """
SELECT p.messages AS prompt,
       [{'role': 'assistant', 'content': q.chosen}] AS chosen,
       [{'role': 'assistant', 'content': q.rejected}] AS rejected,
       q.prompt_id, q."group", q.score_chosen, q.score_rejected, q.score_margin, $strategy AS strategy,
       q.chosen_index, q.rejected_index,
       NULL::DOUBLE AS policy_logp_ref_chosen, NULL::DOUBLE AS policy_logp_ref_rejected,
       NULL::INTEGER AS n_votes, NULL::DOUBLE AS agreement, NULL::VARCHAR AS annotator
FROM paired AS q JOIN prompts AS p USING (prompt_id)
WHERE q.reason IS NULL AND q.turn_in_group <= $quota
ORDER BY q.prompt_id
"""

_REJECTED = """
SELECT 'assemble' AS stage, NULL::BIGINT AS "row", prompt_id, "group", coalesce(reason, 'quota') AS reason,
       CASE coalesce(reason, 'quota')
           WHEN 'too_few_candidates' THEN concat(n_usable, ' finished and scored candidates; a pair needs 2')
           WHEN 'margin' THEN concat('margin ', round(score_margin, 6), ' is not above ', $min_margin)
           WHEN 'quota' THEN concat('the group has ', $quota, ' pairs already')
           WHEN 'unknown_prompt' THEN 'the prompts have no such prompt_id'
           WHEN 'tie' THEN concat('both score ', score_chosen)
           ELSE 'both answers have the same text'
       END AS detail
FROM paired
WHERE reason IS NOT NULL OR turn_in_group > $quota
ORDER BY prompt_id
"""


def build_pairs(candidates: pa.Table, prompts: pa.Table, rules: PairRules) -> PairResult:
    """Pair the best answer of every prompt with another one; deterministic, whatever the order of the rows.

    Which prompts stay under a quota, and which answer `best_vs_random` takes, is decided by a hash of the seed.
    """
    quota = 2**62 if rules.max_pairs_per_group is None else rules.max_pairs_per_group
    with duckdb.connect() as connection:
        connection.register("candidates", candidates)
        connection.register("prompts", prompts)
        connection.execute(_USABLE, {"seed": rules.seed})
        paired = _PAIRED.format(order_by=_ORDER_BY[rules.strategy])
        connection.execute(paired, {"seed": rules.seed, "min_margin": rules.min_margin})
        pairs = connection.sql(_PREFERENCES, params={"strategy": rules.strategy, "quota": quota})
        preferences = checked("preferences", pairs.to_arrow_table())
        dropped = connection.sql(_REJECTED, params={"min_margin": rules.min_margin, "quota": quota})
        return PairResult(preferences, checked("rejected", dropped.to_arrow_table()))
