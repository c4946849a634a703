"""Compaction of the arena."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.decoding.arena import Arena, ArenaShape, plan_moves


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


def test_release_moves_keys_and_values_in_place() -> None:
    arena = Arena(ArenaShape(2, 5, 1, 4, 3), torch.float32, torch.device("cpu"))
    assert arena.take(4) == slice(0, 4)
    address = arena.memory.data_ptr()
    for row in range(4):
        arena.memory[:, :, row, :, :2] = row + 1
    arena.release([0, 2], n_slots=2)
    assert (arena.n_live, arena.n_free) == (2, 3)
    assert arena.memory.data_ptr() == address
    assert arena.keys(1)[0, 0, :2].unique().tolist() == [4]
    assert arena.values(0)[1, 0, :2].unique().tolist() == [2]
    assert arena.take(3) == slice(2, 5)
