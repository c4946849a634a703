"""The order of the pairs, and how processes share it."""

import pytest

from runtime.alignment.sampler import LengthGrouped


def _steps(n_pairs: int, batch_size: int, n_processes: int) -> list[list[list[int]]]:
    """The pairs of every step, process by process, as accelerate deals them out: one batch after the other."""
    sampler = LengthGrouped([index % 7 for index in range(n_pairs)], batch_size, 3, n_processes)
    order = list(sampler)
    assert len(order) == len(sampler)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[start : start + n_processes] for start in range(0, len(batches), n_processes)]


@pytest.mark.parametrize("n_pairs", [400, 397, 389, 5])
@pytest.mark.parametrize("n_processes", [2, 4])
def test_every_step_of_several_processes_has_the_pairs_of_one_with_the_whole_batch(
    n_pairs: int, n_processes: int
) -> None:
    alone = [sorted(batch) for (batch,) in _steps(n_pairs, 16, 1)]
    shared = _steps(n_pairs, 16 // n_processes, n_processes)
    real = [sorted(index for share in step for index in share if index < n_pairs) for step in shared]
    assert real == alone
    assert sorted(index for step in real for index in step) == list(range(n_pairs))
    for step in shared:
        assert len(step) == n_processes
        counts = [sum(index < n_pairs for index in share) for share in step]
        assert max(counts) - min(counts) <= 1


def test_every_epoch_has_another_order_that_depends_on_nothing_else() -> None:
    sampler, again = (LengthGrouped(list(range(50)), 4, 0) for _ in range(2))
    first = list(sampler)
    sampler.epoch = 1
    assert list(again) == first != list(sampler)
