"""Which answers of a prompt meet, and why a prompt gives no pair."""

import duckdb

from storage.assembly.rules import PairRules, Strategy

# Each gives (b: the better answer, o: the other one) of a prompt, and an order in which pairs are taken.
_BEST_AGAINST = """
SELECT b.prompt_id, b."group", b.candidate_index AS chosen_index, o.candidate_index AS rejected_index,
       b.score AS score_chosen, o.score AS score_rejected, 1 AS turn
FROM ranked AS b JOIN ({others}) AS o ON o.prompt_id = b.prompt_id
WHERE b.place = 1
"""
_WORST = "SELECT * FROM ranked WHERE place = n_answers AND place > 1"
_SECOND = "SELECT * FROM ranked WHERE place = 2"
_RANDOM = """
SELECT * FROM ranked WHERE place > 1
QUALIFY ROW_NUMBER() OVER (PARTITION BY prompt_id ORDER BY md5(concat_ws(':', $seed, prompt_id, candidate_index))) = 1
"""
_TOP_K = """
SELECT b.prompt_id, b."group", b.candidate_index AS chosen_index, o.candidate_index AS rejected_index,
       b.score AS score_chosen, o.score AS score_rejected, b.place AS turn
FROM ranked AS b JOIN ranked AS o ON o.prompt_id = b.prompt_id AND o.place = b.n_answers + 1 - b.place
WHERE b.place <= $top_k AND b.place < o.place
"""
_ALL = """
SELECT b.prompt_id, b."group", b.candidate_index AS chosen_index, o.candidate_index AS rejected_index,
       b.score AS score_chosen, o.score AS score_rejected,
       ROW_NUMBER() OVER (
           PARTITION BY b.prompt_id
           ORDER BY NOT b.score - o.score > $min_margin,
                    md5(concat_ws(':', $seed, b.prompt_id, b.candidate_index, o.candidate_index))
       ) AS turn
FROM ranked AS b JOIN ranked AS o ON o.prompt_id = b.prompt_id AND o.place > b.place
"""
_STRATEGIES: dict[Strategy, str] = {
    "best_vs_worst": _BEST_AGAINST.format(others=_WORST),
    "best_vs_second": _BEST_AGAINST.format(others=_SECOND),
    "best_vs_random": _BEST_AGAINST.format(others=_RANDOM),
    "top_k_vs_bottom_k": _TOP_K,
    "all_pairs": _ALL,
}

_PROPOSED = """
CREATE TEMP TABLE proposed AS
WITH pairs AS ({strategy})
SELECT *, score_chosen - score_rejected AS score_margin
FROM pairs WHERE turn <= $max_pairs_per_prompt
"""

_SOUND = """
CREATE TEMP TABLE sound AS
SELECT p.*, s.split,
       ROW_NUMBER() OVER (
           PARTITION BY p."group"
           ORDER BY md5(concat_ws(':', $seed, p.prompt_id)), p.turn, p.chosen_index, p.rejected_index
       ) AS turn_in_group
FROM proposed AS p JOIN splits AS s USING (prompt_id)
WHERE p.score_margin > $min_margin
  AND p.prompt_id NOT IN (SELECT prompt_id FROM screened)
  AND p.prompt_id IN (SELECT prompt_id FROM prompts)
"""

_DROPPED = """
CREATE TEMP TABLE dropped AS
WITH asked AS (SELECT prompt_id, any_value("group") AS "group" FROM answers GROUP BY prompt_id),
usable AS (SELECT prompt_id, COUNT(*) AS n_usable FROM answers WHERE reason IS NULL GROUP BY prompt_id),
texts AS (SELECT prompt_id, any_value(n_answers) AS n_texts FROM ranked GROUP BY prompt_id),
widest AS (SELECT prompt_id, MAX(score_margin) AS margin FROM proposed GROUP BY prompt_id),
judged AS (
    SELECT a.prompt_id, a."group", coalesce(u.n_usable, 0) AS n_usable, w.margin, s.detail AS screened,
           CASE WHEN a.prompt_id NOT IN (SELECT prompt_id FROM prompts) THEN 'unknown_prompt'
                WHEN s.reason IS NOT NULL THEN s.reason
                WHEN coalesce(u.n_usable, 0) < 2 THEN 'too_few_candidates'
                WHEN t.n_texts < 2 THEN 'duplicate_response'
                WHEN w.margin = 0 THEN 'tie'
                WHEN NOT w.margin > $min_margin THEN 'margin'
                WHEN k.prompt_id IS NULL THEN 'quota'
           END AS reason
    FROM asked AS a
    LEFT JOIN usable AS u USING (prompt_id) LEFT JOIN texts AS t USING (prompt_id)
    LEFT JOIN widest AS w USING (prompt_id) LEFT JOIN screened AS s USING (prompt_id)
    LEFT JOIN (SELECT DISTINCT prompt_id FROM kept) AS k USING (prompt_id)
)
SELECT prompt_id, "group", reason,
       CASE reason
           WHEN 'unknown_prompt' THEN 'the prompts have no such prompt_id'
           WHEN 'too_few_candidates' THEN concat(n_usable, ' usable answers; a pair needs 2')
           WHEN 'duplicate_response' THEN concat('all ', n_usable, ' usable answers have the same text')
           WHEN 'tie' THEN 'the best and the other answer have the same score'
           WHEN 'margin' THEN concat('margin ', round(margin, 6), ' is not above ', $min_margin)
           WHEN 'quota' THEN 'its group has all the pairs it may have'
           ELSE screened
       END AS detail
FROM judged WHERE reason IS NOT NULL
"""


def propose_pairs(connection: duckdb.DuckDBPyConnection, rules: PairRules) -> None:
    """Make `proposed` (all that the strategy names) and `sound` (those that may be used) from `ranked` and `splits`."""
    strategy = _STRATEGIES[rules.strategy]
    known = {
        "seed": rules.seed,
        "top_k": rules.top_k,
        "min_margin": rules.min_margin,
        "max_pairs_per_prompt": 2**62 if rules.max_pairs_per_prompt is None else rules.max_pairs_per_prompt,
    }
    query = _PROPOSED.format(strategy=strategy)
    connection.execute(query, {name: value for name, value in known.items() if f"${name}" in query})
    connection.execute(_SOUND, {"seed": rules.seed, "min_margin": rules.min_margin})


def explain_drops(connection: duckdb.DuckDBPyConnection, rules: PairRules) -> None:
    """Make `dropped`: every prompt without a pair, and why. Needs `kept`."""
    connection.execute(_DROPPED, {"min_margin": rules.min_margin})
