import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.assembly.rules import AssemblyRules, GroupRules, PairRules
from storage.schema import to_table
from tests.storage.assembly.pairs import build_pairs
from tests.storage.rows import candidate, prompt

scores = st.one_of(st.none(), st.integers(-3, 3).map(float))
reasons = st.sampled_from(["eos", "eos", "eos", "length", "cut"])
answers = st.lists(st.tuples(scores, reasons, st.sampled_from(["ok", "ok", "error"])), min_size=1, max_size=6)


def _tables(drawn: list[list[tuple[Any, ...]]]) -> tuple[pa.Table, pa.Table]:
    candidates = [
        candidate(f"p{i}", j, score, finish_reason=reason, status=status, group="ab"[i % 2])
        for i, rows in enumerate(drawn)
        for j, (score, reason, status) in enumerate(rows)
    ]
    prompts = [prompt(f"p{i}", "ab"[i % 2]) for i in range(len(drawn))]
    return to_table("candidates", candidates), to_table("prompts", prompts)


def _oracle(rows: list[tuple[Any, ...]], strategy: str, min_margin: float) -> tuple[int, int] | None:
    usable = [(score, j) for j, (score, reason, status) in enumerate(rows) if score is not None and status == "ok"]
    usable = [(score, j) for score, j in usable if rows[j][1] != "cut"]
    ranked = sorted(usable, key=lambda pair: (-pair[0], pair[1]))
    if len(ranked) < 2:
        return None
    other = ranked[-1] if strategy == "best_vs_worst" else ranked[1]
    margin = ranked[0][0] - other[0]
    return (ranked[0][1], other[1]) if margin > max(min_margin, 0) else None


@settings(deadline=None, max_examples=40)
@given(
    st.lists(answers, min_size=1, max_size=5),
    st.sampled_from(["best_vs_worst", "best_vs_second"]),
    st.sampled_from([0.0, 1.0, 2.5]),
)
def test_pairs_agree_with_a_plain_oracle(drawn: list[list[tuple[Any, ...]]], strategy: Any, margin: float) -> None:
    result = build_pairs(*_tables(drawn), PairRules(strategy, margin))
    found = {row["prompt_id"]: (row["chosen_index"], row["rejected_index"]) for row in result.preferences.to_pylist()}
    wanted = {f"p{i}": _oracle(rows, strategy, margin) for i, rows in enumerate(drawn)}
    assert found == {prompt_id: pair for prompt_id, pair in wanted.items() if pair}
    assert set(result.rejected["prompt_id"].to_pylist()) == {p for p, pair in wanted.items() if not pair}


def test_the_order_of_the_rows_does_not_matter() -> None:
    candidates, prompts = _tables([[(float(j * i % 4), "eos", "ok") for j in range(5)] for i in range(1, 6)])
    backwards = candidates.take(list(reversed(range(candidates.num_rows))))
    for strategy in ("best_vs_worst", "best_vs_random", "best_vs_second"):
        rules = AssemblyRules(pairs=PairRules(strategy), groups=GroupRules(max_pairs=1))
        first, second = build_pairs(candidates, prompts, rules), build_pairs(backwards, prompts, rules)
        assert first.preferences.equals(second.preferences)
        assert first.rejected.equals(second.rejected)


def test_best_vs_random_is_seeded() -> None:
    tables = _tables([[(float(j), "eos", "ok") for j in range(6)] for _ in range(20)])
    drawn = [
        build_pairs(*tables, PairRules("best_vs_random", seed=seed)).preferences["rejected_index"].to_pylist()
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) == set(range(5))


def test_a_quota_caps_every_group_and_says_so() -> None:
    tables = _tables([[(0.0, "eos", "ok"), (1.0, "eos", "ok")] for _ in range(9)])
    result = build_pairs(*tables, GroupRules(max_pairs=2))
    assert sorted(result.preferences["group"].to_pylist()) == ["a", "a", "b", "b"]
    assert set(result.rejected["reason"].to_pylist()) == {"quota"}
    assert result.rejected.num_rows == 5


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([(1.0, "eos", "ok")], "too_few_candidates"),
        ([(1.0, "eos", "ok"), (2.0, "cut", "ok")], "too_few_candidates"),
        ([(1.0, "eos", "ok"), (1.0, "eos", "ok")], "tie"),
        ([(1.0, "eos", "ok"), (1.2, "eos", "ok")], "margin"),
    ],
)
def test_a_prompt_without_a_pair_says_why(rows: list[tuple[Any, ...]], reason: str) -> None:
    result = build_pairs(*_tables([rows]), PairRules(min_margin=0.5))
    assert result.preferences.num_rows == 0
    assert result.rejected["reason"].to_pylist() == [reason]


def test_equal_texts_never_pair() -> None:
    rows = [candidate("p0", 0, 1.0, response="same"), candidate("p0", 1, 2.0, response="same")]
    result = build_pairs(to_table("candidates", rows), to_table("prompts", [prompt()]), PairRules())
    assert result.rejected["reason"].to_pylist() == ["duplicate_response"]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.one_of(scores, st.sampled_from([math.nan, math.inf, -math.inf])),
                reasons,
                st.sampled_from(["ok", "ok", "error"]),
            ),
            min_size=1,
            max_size=5,
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(["best_vs_worst", "best_vs_random", "best_vs_second"]),
    st.sampled_from([None, 1]),
)
def test_every_prompt_gives_one_sound_pair_or_one_reason(
    drawn: list[list[tuple[Any, ...]]], strategy: Any, quota: int | None
) -> None:
    candidates, prompts = _tables(drawn)
    result = build_pairs(
        candidates, prompts.slice(1), AssemblyRules(pairs=PairRules(strategy, 0.5), groups=GroupRules(quota))
    )
    pairs, dropped = result.preferences.to_pylist(), result.rejected.to_pylist()
    assert sorted(row["prompt_id"] for row in pairs + dropped) == [f"p{i}" for i in range(len(drawn))]
    assert next(row["reason"] for row in dropped if row["prompt_id"] == "p0") == "unknown_prompt"
    for row in pairs:
        rows = drawn[int(row["prompt_id"][1:])]
        chosen, rejected = rows[row["chosen_index"]], rows[row["rejected_index"]]
        assert {chosen[2], rejected[2]} == {"ok"}
        assert "cut" not in (chosen[1], rejected[1])
        assert 0.5 < row["score_margin"] == chosen[0] - rejected[0] < math.inf
        assert chosen[0] == max(score for score, reason, status in rows if _is_usable(score, reason, status))


def _is_usable(score: float | None, reason: str, status: str) -> bool:
    return score is not None and math.isfinite(score) and reason != "cut" and status == "ok"


def test_a_score_that_is_no_number_never_wins() -> None:
    result = build_pairs(*_tables([[(1.0, "eos", "ok"), (math.nan, "eos", "ok"), (0.0, "eos", "ok")]]), PairRules())
    assert [(row["chosen_index"], row["rejected_index"]) for row in result.preferences.to_pylist()] == [(0, 2)]
