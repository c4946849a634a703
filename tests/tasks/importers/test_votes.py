from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.importers.votes import Count, count_votes, winner

choices = st.lists(st.sampled_from([0, 1, None]), min_size=1, max_size=12)
shares = st.sampled_from([0.5, 0.625, 0.75, 0.875])  # exact as floats


@given(choices, shares)
def test_the_winner_is_whoever_has_more_than_the_share_of_all_votes(said: list[int | None], share: float) -> None:
    count = count_votes(said)
    wanted = [a for a in (0, 1) if Fraction(sum(c == a for c in said), len(said)) > Fraction(share)]
    assert winner(count, share) == (wanted[0] if wanted else None)
    assert count.n_votes == len(said)


@given(choices, shares)
def test_renaming_the_answers_renames_the_winner(said: list[int | None], share: float) -> None:
    swapped = count_votes([None if c is None else 1 - c for c in said])
    found = winner(count_votes(said), share)
    assert winner(swapped, share) == (None if found is None else 1 - found)


@given(choices, shares, st.randoms(use_true_random=False))
def test_the_order_of_the_votes_does_not_matter(said: list[int | None], share: float, random: object) -> None:
    shuffled = list(said)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert count_votes(shuffled) == count_votes(said)


@given(choices, shares)
def test_a_further_vote_for_the_winner_never_costs_the_victory(said: list[int | None], share: float) -> None:
    found = winner(count_votes(said), share)
    if found is not None:
        assert winner(count_votes([*said, found]), share) == found


@given(choices)
def test_the_agreements_and_the_ties_make_the_whole(said: list[int | None]) -> None:
    count = count_votes(said)
    assert count.agreement(0) + count.agreement(1) + count.tie / count.n_votes == pytest.approx(1)


@pytest.mark.parametrize(
    ("count", "wins"),
    [
        (Count(2, 1, 0), 0),
        (Count(1, 2, 0), 1),
        (Count(1, 1, 0), None),
        (Count(2, 1, 1), None),  # half of the votes is no majority
        (Count(1, 0, 4), None),
        (Count(0, 1, 0), 1),
        (Count(0, 0, 3), None),
    ],
)
def test_half_of_the_votes_is_no_majority(count: Count, wins: int | None) -> None:
    assert winner(count, 0.5) == wins
