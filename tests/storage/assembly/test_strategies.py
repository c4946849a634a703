from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.assembly.rules import PairRules
from storage.schema import to_table
from tests.storage.assembly.pairs import Built, build_pairs
from tests.storage.rows import candidate, prompt

Scores = list[list[int]]  # per prompt
many_scores = st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=6), min_size=1, max_size=4)


def _build(scores: Scores, rules: PairRules) -> Built:
    rows = [candidate(f"p{i}", j, float(score)) for i, found in enumerate(scores) for j, score in enumerate(found)]
    prompts = to_table("prompts", [prompt(f"p{i}") for i in range(len(scores))])
    return build_pairs(to_table("candidates", rows), prompts, rules)


def _pairs(built: Built) -> list[tuple[str, int, int]]:
    columns = ("prompt_id", "chosen_index", "rejected_index")
    return [tuple(row[name] for name in columns) for row in built.preferences.to_pylist()]


def _ranked(scores: list[int]) -> list[int]:
    return sorted(range(len(scores)), key=lambda j: (-scores[j], j))


@settings(deadline=None, max_examples=30)
@given(many_scores, st.sampled_from([0, 1, 2]))
def test_all_pairs_are_all_that_differ_by_more_than_the_margin(scores: Scores, margin: int) -> None:
    wanted = [
        (f"p{i}", a, b)
        for i, found in enumerate(scores)
        for a, b in combinations(_ranked(found), 2)
        if found[a] - found[b] > margin
    ]
    assert sorted(_pairs(_build(scores, PairRules("all_pairs", margin)))) == sorted(wanted)


@settings(deadline=None, max_examples=30)
@given(many_scores, st.integers(1, 4))
def test_the_best_meet_the_worst_and_never_cross(scores: Scores, k: int) -> None:
    wanted = []
    for i, found in enumerate(scores):
        order = _ranked(found)
        met = [(order[place], order[-1 - place]) for place in range(min(k, len(order) // 2))]
        wanted += [(f"p{i}", a, b) for a, b in met if found[a] > found[b]]
    assert sorted(_pairs(_build(scores, PairRules("top_k_vs_bottom_k", top_k=k)))) == sorted(wanted)


def test_pairs_of_a_prompt_are_limited_by_a_seeded_choice_among_the_sound_ones() -> None:
    scores = [[0, 0, 0, 0, 5, 9]] * 30
    drawn = [_pairs(_build(scores, PairRules("all_pairs", max_pairs_per_prompt=3, seed=seed))) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 90
    assert len({pair[1:] for pair in drawn[0]}) == 9  # every sound pair is drawn somewhere


@pytest.mark.parametrize("strategy", ["best_vs_worst", "best_vs_random", "best_vs_second", "all_pairs"])
def test_equal_texts_count_once(strategy: Any) -> None:
    texts = ["good", "good", "good", "bad"]
    rows = [candidate("p0", j, 2.0 if text == "good" else 1.0, response=text) for j, text in enumerate(texts)]
    built = build_pairs(to_table("candidates", rows), to_table("prompts", [prompt()]), PairRules(strategy))
    assert _pairs(built) == [("p0", 0, 3)]


def test_no_prompt_is_in_both_splits() -> None:
    scores = [[0, 1, 2]] * 400
    built = _build(scores, PairRules("all_pairs", test_share=0.25))
    train, test = (set(table["prompt_id"].to_pylist()) for table in (built.preferences, built.test))
    assert train.isdisjoint(test)
    assert len(train | test) == 400
    assert 60 <= len(test) <= 140
    assert built.groups["child"].pairs == 1200
    assert built.groups["child"].test_pairs == 3 * len(test)


def test_scorers_that_disagree_about_a_pair_stay_visible() -> None:
    def scored(index: int, **values: float) -> dict[str, object]:
        scores = [{"scorer": name, "value": value} for name, value in values.items()]
        return candidate("p0", index, float(index), scores=scores)

    rows = [scored(0, a=0.0, b=5.0, c=1.0, only_here=3.0), scored(1, a=1.0, b=4.0, c=2.0)]
    built = build_pairs(to_table("candidates", rows), to_table("prompts", [prompt()]))
    (row,) = built.preferences.to_pylist()
    assert (row["n_votes"], row["agreement"]) == (3, pytest.approx(2 / 3))
    alone = [scored(0, a=0.0), scored(1, a=1.0)]
    (row,) = build_pairs(to_table("candidates", alone), to_table("prompts", [prompt()])).preferences.to_pylist()
    assert (row["n_votes"], row["agreement"]) == (None, None)
