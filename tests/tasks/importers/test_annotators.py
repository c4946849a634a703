"""Judgements of several people: what their group prefers, or what each of them does."""

from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.errors import ConfigError
from tasks.importers.collect import collect
from tasks.importers.sources import SourceRow
from tasks.settings import ImportConfig
from tests.tasks.importers.helpers import collected, reasons, write_rows

CONFIG = {"layout": "annotators", "source": "none", "prompt_column": None}


def _judgement(annotator: object, group: object, choice: object, **changes: object) -> dict[str, object]:
    row = {"prompt": "Tea?", "response_a": "Yes", "response_b": "No"}
    return row | {"annotator": annotator, "group": group, "choice": choice} | changes


ROWS = [
    _judgement("ann", "old", "a"),
    _judgement("bob", "old", "A "),
    _judgement("cid", "old", "a", response_a="No", response_b="Yes"),  # the other way round: a vote for No
    _judgement("dan", "young", "b"),
    _judgement("eve", "young", "tie"),
    _judgement("eve", "young", "b", prompt="Coffee?"),
    _judgement(7, "young", "a", prompt="Coffee?"),
    _judgement("ann", "old", "b"),  # a second opinion of ann
    _judgement("fay", "old", "maybe"),
    _judgement("fay", "old", None),
    _judgement("fay", None, "a"),
    _judgement(" ", "old", "a"),
    _judgement("fay", "old", "a", response_b="Yes "),
]
BAD = [
    (8, "duplicate"),
    (9, "unknown_choice"),
    (10, "unknown_choice"),
    (11, "no_group"),
    (12, "missing_value"),
    (13, "equal_answers"),
]


def test_a_majority_is_one_pair_per_group_with_its_agreement(tmp_path: Path) -> None:
    found = collected(write_rows(tmp_path / "p.jsonl", ROWS), layout="annotators")
    (pair,) = found.pairs
    assert (pair.messages[0]["content"], pair.chosen, pair.rejected, pair.group) == ("Tea?", "Yes", "No", "old")
    assert (pair.n_votes, pair.agreement, pair.annotator, pair.strategy) == (3, 2 / 3, None, "majority")
    assert reasons(found) == [*BAD, (None, "low_agreement"), (None, "tie")]
    assert [(row["group"], row["detail"]) for row in found.rejected[-2:]] == [
        ("young", "1 for one answer, 0 for the other, 1 for neither"),
        ("young", "1 for one answer, 1 for the other, 0 for neither"),
    ]
    assert found.n_judgements == 7


def test_every_annotator_can_have_a_pair_of_their_own(tmp_path: Path) -> None:
    found = collected(write_rows(tmp_path / "p.jsonl", ROWS), layout="annotators", votes="each")
    rows = [(pair.annotator, pair.group, pair.chosen, pair.n_votes, pair.agreement) for pair in found.pairs]
    assert rows == [
        ("ann", "old", "Yes", 3, 2 / 3),
        ("bob", "old", "Yes", 3, 2 / 3),
        ("cid", "old", "No", 3, 1 / 3),
        ("dan", "young", "No", 2, 0.5),
        ("eve", "young", "No", 2, 0.5),
        ("7", "young", "Yes", 2, 0.5),
    ]
    assert reasons(found) == [*BAD, (None, "tie")]


def test_a_higher_agreement_can_be_asked_for(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", ROWS)
    assert len(collected(path, layout="annotators", min_agreement=0.66).pairs) == 1
    none = collected(path, layout="annotators", min_agreement=0.67)
    assert (none.pairs, reasons(none)[-3:]) == ([], [(None, "low_agreement"), (None, "low_agreement"), (None, "tie")])


def test_the_values_of_a_choice_can_be_named(tmp_path: Path) -> None:
    values = {"choices_a": ["model_a", "1"], "choices_b": ["model_b", "2"], "choices_tie": ["tie (bothbad)"]}
    rows = [_judgement(str(i), "g", choice) for i, choice in enumerate(["MODEL_A", 1, "model_b", "Tie (bothbad)"])]
    found = collected(write_rows(tmp_path / "p.jsonl", rows), layout="annotators", votes="each", **values)
    assert [pair.chosen for pair in found.pairs] == ["Yes", "Yes", "No"]
    assert reasons(found) == [(None, "tie")]


judgements = st.lists(
    st.tuples(
        st.integers(0, 3),  # annotator
        st.sampled_from(["g", "h"]),
        st.sampled_from(["Tea?", "Coffee?"]),
        st.sampled_from(["a", "b", "tie"]),
        st.booleans(),  # answers the other way round
    ),
    max_size=25,
)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(judgements, st.sampled_from([0.5, 0.625, 0.75]))
def test_no_judgement_is_lost_and_groups_are_counted_apart(
    drawn: list[tuple[int, str, str, str, bool]], share: float
) -> None:
    rows = []
    for number, (who, group, prompt, choice, is_swapped) in enumerate(drawn, start=1):
        answers = {"response_a": "No", "response_b": "Yes"} if is_swapped else {}
        row = _judgement(f"n{who}", group, choice, prompt=prompt, **answers)
        rows.append(SourceRow("", None, number, row))
    results = {}
    for votes in ("majority", "each"):
        found = collect(rows, ImportConfig.model_validate(CONFIG | {"votes": votes, "min_agreement": share}))
        results[votes] = found

    # An oracle: the first judgement of an annotator on a pair counts.
    said: dict[tuple[str, str], dict[int, str]] = {}
    for who, group, prompt, choice, is_swapped in drawn:
        text = {"a": "No" if is_swapped else "Yes", "b": "Yes" if is_swapped else "No", "tie": "tie"}[choice]
        said.setdefault((prompt, group), {}).setdefault(who, text)
    wanted = {}
    for key, voices in said.items():
        counts = Counter(voices.values())
        for answer in ("Yes", "No"):
            if Fraction(counts[answer], len(voices)) > Fraction(share):
                wanted[key] = (answer, len(voices), counts[answer] / len(voices))
    majority, each = results["majority"], results["each"]
    found_pairs = {(p.messages[0]["content"], p.group): (p.chosen, p.n_votes, p.agreement) for p in majority.pairs}
    assert found_pairs == wanted
    assert len(majority.pairs) == len(wanted)
    n_judgements = sum(map(len, said.values()))
    assert majority.n_judgements == each.n_judgements == n_judgements
    doubles = [row for row in each.rejected if row["reason"] == "duplicate"]
    ties = [row for row in each.rejected if row["reason"] == "tie"]
    assert len(each.pairs) + len(ties) == n_judgements == len(drawn) - len(doubles)
    assert len(majority.pairs) + len(majority.rejected) - len(doubles) == len(said)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"choices_b": ["A"]}, 'choice "A" stands for a and for b'),
        ({"layout": "columns", "votes": "each"}, 'votes is for layout = "annotators", not "columns"'),
        ({"layout": "persona", "prompt_column": "x"}, 'prompt_column is for layout = "columns", not "persona"'),
        ({"group_column": "x", "group_constant": "y"}, "keep one"),
        ({"layout": "columns", "score_chosen_column": "s"}, "go together"),
        ({"min_agreement": 0.4}, "greater than or equal to 0.5"),
        ({"test_share": 1.0}, "less than 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values: dict[str, object], message: str) -> None:
    from flows.config import validate

    with pytest.raises(ConfigError) as caught:
        validate({"import_preferences": CONFIG | values})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
