"""Compaction of the arena, and rows grouped by prompt."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.kv.arena import Arena, ArenaSize, KVShape, plan_moves

SIZE = ArenaSize(n_prompts=3, prompt_slots=5, n_rows=6, row_slots=4)


@pytest.fixture
def arena() -> Arena:
    """Three prompts of 2, 5 and 3 tokens with 3, 1 and 2 rows; row i holds i + 1, prompt i holds 10 * (i + 1)."""
    arena = Arena(KVShape(2, 2, 3), SIZE, torch.float32, torch.device("cpu"))
    assert [arena.add(2, 3), arena.add(5, 1), arena.add(3, 2)] == [slice(0, 3), slice(3, 4), slice(4, 6)]
    for row in range(6):
        for layer in arena.rows:
            layer[:, row, :, :2] = row + 1
        arena.row_tokens[row] = 2
    for prompt in range(3):
        arena.prompts[:, :, prompt] = 10 * (prompt + 1)
    return arena


@given(st.integers(1, 20).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_moves_close_every_hole_with_few_copies(case: tuple[int, set[int]]) -> None:
    n_live, leaving = case
    moves = plan_moves(n_live, leaving)
    rows = list(range(n_live))
    for source, target in zip(moves.source, moves.target, strict=True):
        rows[target] = source
    assert set(rows[: n_live - len(leaving)]) == set(range(n_live)) - leaving
    assert len(moves.source) <= len(leaving)
    assert not set(moves.source) & set(moves.target)


def test_release_moves_rows_in_place(arena: Arena) -> None:
    address = arena.rows[0].data_ptr()
    arena.release([0, 2], n_slots=2)
    assert (arena.n_rows, arena.n_free_rows, arena.n_prompts) == (4, 2, 3)
    assert arena.rows[0].data_ptr() == address
    assert arena.rows[1][0, :4, 0, 0, 0].tolist() == [5, 2, 6, 4]
    assert arena.owners == [2, 0, 2, 1]


def test_a_prompt_without_rows_leaves(arena: Arena) -> None:
    arena.release([0, 1, 2], n_slots=2)
    assert (arena.n_rows, arena.n_prompts, arena.n_free_prompts) == (3, 2, 1)
    assert arena.prompts[0, 0, :2, 0, 0, 0].tolist() == [30, 20]
    assert arena.prompt_tokens[:2].tolist() == arena.prompt_lengths == [3, 5]
    assert [arena.prompts[0, 0, owner, 0, 0, 0].item() for owner in arena.owners] == [20, 30, 30]


def test_rows_of_a_prompt_stand_together(arena: Arena) -> None:
    assert arena.layout(slice(0, arena.n_rows)).n_width == 3
    arena.release([1], n_slots=2)
    layout = arena.layout(slice(0, arena.n_rows))
    assert (layout.n_longest, layout.n_width) == (5, 2)
    assert layout.members is not None and layout.places is not None
    assert layout.members[layout.places].tolist() == list(range(5))
    assert (layout.places // layout.n_width).tolist() == arena.owners


def test_equal_groups_in_order_need_no_index() -> None:
    arena = Arena(KVShape(1, 1, 2), SIZE, torch.float32, torch.device("cpu"))
    arena.add(2, 3)
    arena.add(2, 3)
    assert arena.layout(slice(0, arena.n_rows)).members is None


def test_bytes_are_those_of_the_size(arena: Arena) -> None:
    assert arena.n_bytes == KVShape(2, 2, 3).n_bytes(SIZE.n_tokens, torch.float32)


@pytest.mark.parametrize("change", ["fit", "resize"])
def test_rows_keep_what_they_hold_when_they_grow_and_shrink(change: str) -> None:
    size = ArenaSize(n_prompts=1, prompt_slots=1, n_rows=3, row_slots=100)
    arena = Arena(KVShape(2, 2, 3), size, torch.float32, torch.device("cpu"))
    arena.add(1, 3)
    held = torch.randn(2, 2, 3, 2, 20, 3)
    for layer, content in zip(arena.rows, held, strict=True):
        layer[:, :, :, :20] = content
    arena.row_tokens[:3] = 20
    for n_tokens in (90, 40, 20, 99):
        if change == "fit":
            arena.fit(n_tokens)
        else:
            arena.resize(3, n_tokens + 1)
        assert arena.n_slots > n_tokens or change == "resize"
        assert all(torch.equal(layer[:, :, :, :20], content) for layer, content in zip(arena.rows, held, strict=True))
    assert arena.row_tokens.tolist() == [20, 20, 20]


def test_shorter_rows_leave_room_for_more() -> None:
    size = ArenaSize(n_prompts=1, prompt_slots=1, n_rows=8, row_slots=100, row_tokens=8 * 32)
    arena = Arena(KVShape(1, 1, 2), size, torch.float32, torch.device("cpu"))
    assert [arena.n_rows_with(n_tokens) for n_tokens in (10, 31, 32, 99)] == [8, 8, 4, 2]
    arena.add(1, 8)
    arena.release([0, 1, 2, 3, 4, 5], n_slots=1)
    arena.fit(99)
    assert (arena.n_slots, arena.n_free_rows) == (100, 0)
    arena.release([0, 1], n_slots=1)
    assert arena.n_free_rows == 8
