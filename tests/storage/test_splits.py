from hypothesis import given
from hypothesis import strategies as st

from storage.splits import split_of

ids = st.text("0123456789abcdef", min_size=32, max_size=32)
shares = st.floats(0, 1)
seeds = st.integers(0, 2**31 - 1)


@given(ids, shares, shares, seeds)
def test_a_larger_share_keeps_what_was_held_out(prompt_id: str, one: float, other: float, seed: int) -> None:
    smaller, larger = sorted((one, other))
    if split_of(prompt_id, smaller, seed) == "test":
        assert split_of(prompt_id, larger, seed) == "test"


@given(ids, seeds)
def test_no_share_holds_out_nothing_and_the_whole_share_everything(prompt_id: str, seed: int) -> None:
    assert split_of(prompt_id, 0.0, seed) == "train"
    assert split_of(prompt_id, 1.0, seed) == "test"


def test_the_share_is_kept_and_the_seed_draws_another_part() -> None:
    prompts = [f"{i:032x}" for i in range(4000)]
    held_out = [{p for p in prompts if split_of(p, 0.25, seed) == "test"} for seed in (0, 1)]
    assert all(900 < len(found) < 1100 for found in held_out)
    assert 150 < len(held_out[0] & held_out[1]) < 350  # independent draws share a sixteenth, 250


def test_the_split_of_a_prompt_is_the_same_in_every_process() -> None:
    assert [i for i in range(12) if split_of(f"{i:032x}", 0.5, 7) == "test"] == [6, 8, 11]
