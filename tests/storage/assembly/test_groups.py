import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.assembly.quotas import group_caps
from storage.assembly.rules import AssemblyRules, GroupRules
from storage.errors import AssemblyError
from storage.schema import to_table
from tests.storage.assembly.pairs import Built, build_pairs
from tests.storage.rows import candidate, prompt

HOSTILE = "a'; DROP TABLE kept; --"


def _build(
    sizes: dict[str, int], rules: GroupRules | AssemblyRules, screened: list[dict[str, str]] | None = None
) -> Built:
    names = [(f"{group}-{i}", group) for group, n in sizes.items() for i in range(n)]
    rows = [candidate(name, j, float(j), group=group) for name, group in names for j in range(2)]
    prompts = to_table("prompts", [prompt(*name) for name in names])
    return build_pairs(to_table("candidates", rows), prompts, rules, screened or [])


def _counts(built: Built) -> dict[str, int]:
    return {group: report.pairs for group, report in built.groups.items()}


def test_quotas_hold_for_the_groups_they_name_and_the_cap_for_the_others() -> None:
    built = _build({"child": 9, "clerk": 5, HOSTILE: 3}, GroupRules(max_pairs=2, quotas={HOSTILE: 1, "child": 4}))
    assert _counts(built) == {"child": 4, "clerk": 2, HOSTILE: 1}
    assert built.groups["child"].dropped == {"quota": 5}


def test_balance_cuts_every_group_down_to_the_smallest() -> None:
    assert _counts(_build({"a": 9, "b": 5, "c": 1}, GroupRules(balance="smallest"))) == {"a": 1, "b": 1, "c": 1}


def test_one_group_with_one_prompt_is_enough() -> None:
    built = _build({"only": 1}, GroupRules(max_pairs=5, balance="smallest"))
    assert _counts(built) == {"only": 1}
    assert built.rejected.num_rows == 0


def test_a_quota_for_a_group_that_is_absent_names_those_that_are_there() -> None:
    with pytest.raises(AssemblyError, match='group "boss", which no candidate has; the groups are a, b'):
        _build({"a": 1, "b": 1}, GroupRules(quotas={"boss": 3}))


def test_a_group_below_the_minimum_is_an_error_that_names_it() -> None:
    with pytest.raises(AssemblyError, match=re.escape('group "b" has 2 pairs, fewer than the minimum of 3')):
        _build({"a": 5, "b": 2}, GroupRules(min_pairs=3))


groups = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 50), min_size=1)


@given(groups, st.none() | st.integers(1, 60), st.dictionaries(st.sampled_from("abcd"), st.integers(0, 60)))
def test_caps_never_exceed_what_there_is_or_what_is_allowed(
    available: dict[str, int], cap: int | None, quotas: dict[str, int]
) -> None:
    quotas = {group: n for group, n in quotas.items() if group in available}
    found = group_caps(available, GroupRules(cap, quotas=quotas))
    for group, n in available.items():
        bounds = [n, quotas[group]] if group in quotas else [n, *([cap] if cap is not None else [])]
        assert found[group] == min(bounds)
    balanced = group_caps(available, GroupRules(cap, quotas=quotas, balance="smallest"))
    assert set(balanced.values()) == {min(found.values())}


def test_the_report_adds_up() -> None:
    screened = [{"prompt_id": "a-0", "reason": "language", "detail": "fr"}]
    built = _build({"a": 4, "b": 3}, GroupRules(max_pairs=2), screened)
    for report in built.groups.values():
        assert report.prompts == report.pairs + sum(report.dropped.values())
        assert report.candidates == 2 * report.prompts
        assert report.mean_margin == 1.0
    assert built.groups["a"].dropped == {"language": 1, "quota": 1}
    assert ("a-0", "language", "fr") in [
        (row["prompt_id"], row["reason"], row["detail"]) for row in built.rejected.to_pylist()
    ]
