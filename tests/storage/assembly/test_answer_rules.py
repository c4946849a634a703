import pytest

from storage.assembly.rules import AnswerRules, AssemblyRules, PairRules
from storage.errors import LakeError
from storage.schema import to_table
from tests.storage.assembly.pairs import Built, build_pairs
from tests.storage.rows import candidate, prompt


def _build(rows: list[dict[str, object]], rules: AnswerRules | AssemblyRules) -> Built:
    names = {(str(row["prompt_id"]), str(row["group"])) for row in rows}
    return build_pairs(to_table("candidates", rows), to_table("prompts", [prompt(*name) for name in names]), rules)


def _pair(built: Built) -> list[tuple[int, int]]:
    return [(row["chosen_index"], row["rejected_index"]) for row in built.preferences.to_pylist()]


LENGTHS = [candidate("p0", j, float(j), n_tokens=10 * (j + 1)) for j in range(5)]


def test_answers_out_of_bounds_are_rejected_rows_and_in_no_pair() -> None:
    built = _build(LENGTHS, AnswerRules(min_tokens=20, max_tokens=40))
    assert _pair(built) == [(3, 1)]
    rows = [(row["row"], row["reason"], row["detail"]) for row in built.rejected.to_pylist()]
    assert rows == [(0, "too_short", "10 tokens"), (4, "too_long", "50 tokens")]
    assert built.groups["child"].unused == {"too_long": 1, "too_short": 1}


@pytest.mark.parametrize(
    ("rules", "pair"),
    [
        (AnswerRules(truncated="keep"), (2, 0)),
        (AnswerRules(truncated="drop"), (1, 0)),
        (AnswerRules(truncated="penalise", truncation_penalty=1.5), (1, 0)),
        (AnswerRules(truncated="penalise", truncation_penalty=9.0), (1, 2)),
        (AnswerRules(truncated="penalise", truncation_penalty=0.5), (2, 0)),
    ],
)
def test_truncated_answers_are_kept_dropped_or_penalised(rules: AnswerRules, pair: tuple[int, int]) -> None:
    rows = [candidate("p0", 0, 0.0), candidate("p0", 1, 1.0), candidate("p0", 2, 2.0, finish_reason="length")]
    built = _build(rows, rules)
    assert _pair(built) == [pair]
    dropped = [row["row"] for row in built.rejected.to_pylist() if row["reason"] == "truncated"]
    assert dropped == ([2] if rules.truncated == "drop" else [])


def test_normalised_scores_have_one_scale_in_every_group() -> None:
    scores = {"a": [0.0, 1.0, 2.0, 3.0], "b": [0.0, 100.0, 200.0, 300.0]}
    rows = [
        candidate(f"p{group}{j // 2}", j % 2, score, group=group)
        for group, found in scores.items()
        for j, score in enumerate(found)
    ]
    built = _build(rows, AssemblyRules(AnswerRules(normalisation="zscore"), PairRules()))
    margins = {row["prompt_id"]: row["score_margin"] for row in built.preferences.to_pylist()}
    deviation = (sum((score - 1.5) ** 2 for score in scores["a"]) / 4) ** 0.5
    assert margins == pytest.approx(dict.fromkeys(["pa0", "pa1", "pb0", "pb1"], 1 / deviation), rel=1e-12)
    chosen = [row["score_chosen"] for row in built.preferences.to_pylist()]
    assert chosen == pytest.approx([-0.5 / deviation, 1.5 / deviation] * 2, rel=1e-12)


def test_a_group_whose_scores_are_all_equal_gives_ties_not_infinities() -> None:
    rows = [candidate("p0", j, 7.0) for j in range(3)]
    built = _build(rows, AnswerRules(normalisation="zscore"))
    assert built.rejected["reason"].to_pylist() == ["tie"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([candidate("p0", 1, 0.0), candidate("p0", 1, 1.0)], "two rows for candidate 1 of prompt p0"),
        ([candidate("p0", 0, 0.0), candidate("p0", 1, 1.0, group="clerk")], "prompt p0 name two groups"),
    ],
)
def test_candidates_that_contradict_themselves_are_refused(rows: list[dict[str, object]], message: str) -> None:
    with pytest.raises(LakeError, match=message):
        _build(rows, AnswerRules())
