import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from runtime.alignment.groups import GroupReducer, GroupSettings, Reducer, suggest_step_size
from runtime.errors import ConfigError, InputError, ModelError

COUNTS = {"clerk": 20, "auditor": 10, "child": 70}  # sorted: auditor, child, clerk


def reducer(kind: Reducer = "robust", counts: dict[str, int] = COUNTS, **settings: float) -> GroupReducer:
    return GroupReducer(GroupSettings(kind, **settings), counts)


def drawn(seed: int, n: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=generator, dtype=torch.float64), torch.randint(0, 3, (n,), generator=generator)


samples = st.lists(st.tuples(st.integers(0, 2), st.floats(0, 50)), min_size=1, max_size=12)


def as_tensors(batch: list[tuple[int, float]]) -> tuple[Tensor, Tensor]:
    return torch.tensor([loss for _, loss in batch], dtype=torch.float64), torch.tensor([g for g, _ in batch])


def oracle_weights(
    batches: list[list[tuple[int, float]]], counts: list[int], step_size: float, adjustment: float
) -> list[float]:
    """Algorithm 1 in plain numbers: products of exponentials, normalised once at the end."""
    raised = [1.0] * len(counts)
    for batch in batches:
        for group, loss in batch:
            moved = loss + adjustment / math.sqrt(counts[group])
            raised[group] *= math.exp(step_size * sum(counts) / counts[group] * moved / len(batch))
    return [value / sum(raised) for value in raised]


@given(batches=st.lists(samples, max_size=4), step_size=st.floats(1e-4, 0.1), adjustment=st.floats(0, 3))
def test_weights_follow_the_exponentiated_gradient(
    batches: list[list[tuple[int, float]]], step_size: float, adjustment: float
) -> None:
    robust = reducer(counts={"a": 3, "b": 5, "c": 4}, step_size=step_size, adjustment=adjustment)
    for batch in batches:
        robust.observe(*as_tensors(batch))
        robust.step()
    wanted = oracle_weights(batches, [3, 5, 4], step_size, adjustment)
    assert robust.weights.tolist() == pytest.approx(wanted, abs=1e-9)


@given(batch=samples, weights=st.lists(st.floats(-3, 0), min_size=3, max_size=3))
def test_the_reduced_loss_and_its_gradient_agree_with_the_sum_written_out(
    batch: list[tuple[int, float]], weights: list[float]
) -> None:
    robust = reducer(chi=0.25)
    logs = torch.tensor(weights, dtype=torch.float64)
    robust.load_state_dict(robust.state_dict() | {"log_weights": (logs - logs.logsumexp(0)).tolist()})
    losses, ids = as_tensors(batch)
    losses.requires_grad_()
    found = robust.reduce(losses, ids)
    found.backward()
    shares = [math.exp(w) / sum(map(math.exp, weights)) for w in weights]
    factors = [(0.75 / 3 + 0.25 * share) * 100 / n for share, n in zip(shares, [10, 70, 20], strict=True)]
    wanted = sum(factors[group] * loss for group, loss in batch) / len(batch)
    assert math.isclose(found.item(), wanted, rel_tol=1e-11, abs_tol=1e-9)
    assert losses.grad.tolist() == pytest.approx([factors[group] / len(batch) for group, _ in batch], abs=1e-9)


@given(batches=st.lists(samples, max_size=5), chi=st.floats(0, 1), step_size=st.floats(1e-6, 1e3))
def test_weights_are_never_negative_and_sum_to_one(
    batches: list[list[tuple[int, float]]], chi: float, step_size: float
) -> None:
    robust = reducer(chi=chi, step_size=step_size)
    for batch in batches:
        robust.observe(*as_tensors(batch))
        robust.step()
    assert robust.weights.dtype == torch.float64
    assert (robust.weights >= 0).all() and robust.weights.isfinite().all()
    assert math.isclose(robust.weights.sum().item(), 1, rel_tol=1e-12)


@given(batch=samples, cut=st.integers(0, 12))
def test_a_batch_in_parts_or_on_ranks_moves_the_weights_as_one(batch: list[tuple[int, float]], cut: int) -> None:
    whole, parts, ranks = reducer(), reducer(), [reducer(), reducer()]
    whole.observe(*as_tensors(batch))
    whole.step()
    for part, rank in zip((batch[:cut], batch[cut:]), ranks, strict=True):
        if part:
            parts.observe(*as_tensors(part))
            rank.observe(*as_tensors(part))
    parts.step()
    total = ranks[0].sums + ranks[1].sums
    for rank in ranks:
        rank.step(total)
    for other in (parts, *ranks):
        assert torch.allclose(other.weights, whole.weights, rtol=1e-12, atol=0)
        assert not other.sums.any()


def test_a_batch_twice_as_large_moves_the_weights_as_far() -> None:
    losses, ids = drawn(0)
    once, twice = reducer(), reducer()
    once.observe(losses, ids)
    twice.observe(losses.repeat(2), ids.repeat(2))
    once.step()
    twice.step()
    assert torch.allclose(once.weights, twice.weights, rtol=1e-12, atol=0)


def test_the_reduced_loss_estimates_the_weighted_group_means_without_bias() -> None:
    """Over batches of any size drawn from the data, its mean is sum_g w_g L_g."""
    ids = torch.tensor([0] * 10 + [1] * 70 + [2] * 20)
    losses = torch.rand(100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    robust = reducer(step_size=1.0)
    robust.observe(losses, ids)
    robust.step()
    means = torch.stack([losses[ids == group].mean() for group in range(3)])
    wanted = (robust.weights * means).sum()
    order = torch.randperm(100, generator=torch.Generator().manual_seed(2))
    for size in (1, 4, 100):
        batches = order.split(size)
        found = torch.stack([robust.reduce(losses[batch], ids[batch]) for batch in batches]).mean()
        assert torch.allclose(found, wanted, rtol=1e-12)


def test_groups_that_a_step_has_not_seen_keep_their_log_weights() -> None:
    robust = reducer(step_size=1.0, adjustment=5.0)
    robust.observe(torch.tensor([1.0, 2.0]), torch.tensor([0, 2]))
    robust.step()
    before = robust.weights
    robust.observe(torch.tensor([3.0]), torch.tensor([0]))
    robust.step()
    assert robust.weights[0] > before[0]
    # Two groups that were not there: as much of one per part of the other as before.
    assert math.isclose(robust.weights[1] / robust.weights[2], before[1] / before[2], rel_tol=1e-12)
    after = robust.weights
    robust.step()
    assert torch.equal(robust.weights, after)


def test_the_group_with_the_larger_loss_gains_weight_until_it_has_all() -> None:
    robust = reducer(step_size=0.1)
    ids = torch.tensor([0] * 10 + [1] * 70 + [2] * 20)
    losses = torch.where(ids == 2, 1.0, 0.5)
    shares = []
    for _ in range(300):
        robust.observe(losses, ids)
        robust.step()
        shares.append(robust.weights[2].item())
    assert all(earlier < later for earlier, later in pairwise([1 / 3, *shares]))
    assert shares[-1] > 0.999


def test_equal_losses_leave_all_groups_alike() -> None:
    robust = reducer(step_size=0.5)
    robust.observe(torch.full((100,), 0.7), torch.tensor([0] * 10 + [1] * 70 + [2] * 20))
    robust.step()
    assert robust.weights.tolist() == pytest.approx([1 / 3] * 3)


def test_the_adjustment_favours_the_small_groups() -> None:
    plain, adjusted = reducer(), reducer(adjustment=1.0)
    for each in (plain, adjusted):
        each.observe(torch.full((100,), 0.7), torch.tensor([0] * 10 + [1] * 70 + [2] * 20))
        each.step()
    assert adjusted.weights[0] > plain.weights[0] and adjusted.weights[1] < plain.weights[1]


def test_mean_is_the_plain_mean_and_importance_that_of_the_group_means() -> None:
    ids = torch.tensor([0] * 10 + [1] * 70 + [2] * 20)
    losses = torch.rand(100, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.equal(reducer("mean").reduce(losses, ids), losses.mean())
    means = torch.stack([losses[ids == group].mean() for group in range(3)])
    assert torch.allclose(reducer("importance").reduce(losses, ids), means.mean(), rtol=1e-12)
    assert reducer("mean").weights.tolist() == [0.1, 0.7, 0.2]
    assert reducer("importance").weights.tolist() == [1 / 3] * 3


@given(batches=st.lists(samples, min_size=1, max_size=4))
def test_importance_is_robust_with_steps_towards_zero_or_with_chi_zero(batches: list[list[tuple[int, float]]]) -> None:
    still, even, plain = reducer(step_size=1e-300), reducer(step_size=1.0, chi=0.0), reducer("importance")
    for batch in batches:
        losses, ids = as_tensors(batch)
        wanted = plain.reduce(losses, ids)
        for other in (still, even):
            assert torch.allclose(other.reduce(losses, ids), wanted, rtol=1e-12)
            other.observe(losses, ids)
            other.step()


@pytest.mark.parametrize("kind", ["mean", "importance"])
def test_weights_of_the_other_reducers_do_not_move(kind: Reducer) -> None:
    fixed = reducer(kind, step_size=1.0)
    before = fixed.weights
    fixed.observe(*drawn(1))
    fixed.step()
    assert torch.equal(fixed.weights, before) and not fixed.sums.any()


def test_huge_losses_do_not_overflow() -> None:
    robust = reducer(step_size=1.0)
    for _ in range(3):
        robust.observe(torch.tensor([1e8, 2e8, 3e8]), torch.tensor([0, 1, 2]))
        robust.step()
    assert robust.weights.isfinite().all() and math.isclose(robust.weights.sum().item(), 1)


def test_what_is_observed_carries_no_gradient_and_any_dtype() -> None:
    robust = reducer()
    losses = torch.tensor([1.5, 2.5], dtype=torch.bfloat16, requires_grad=True)
    robust.observe(losses, torch.tensor([0, 0]))
    assert robust.sums.tolist() == [[4, 0, 0], [2, 0, 0]] and not robust.sums.requires_grad
    assert robust.reduce(losses, torch.tensor([0, 0])).dtype == torch.bfloat16


def test_a_restored_reducer_goes_on_exactly_where_it_was() -> None:
    first, second = reducer(step_size=0.3), reducer(step_size=0.3)
    first.observe(*drawn(2))
    first.step()
    first.observe(*drawn(3))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert torch.equal(first.sums, second.sums)
    for each in (first, second):
        each.observe(*drawn(4))
        each.step()
    assert torch.equal(first.weights, second.weights)


@pytest.mark.parametrize("counts", [{"auditor": 10, "child": 70}, COUNTS | {"child": 71}])
def test_a_state_of_other_groups_is_refused(counts: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="start anew"):
        reducer().load_state_dict(reducer(counts=counts).state_dict())


@pytest.mark.parametrize(
    ("settings", "counts", "message"),
    [
        ({"step_size": 0.0}, COUNTS, "step_size = 0.0 never moves the weights"),
        ({"step_size": -1.0}, COUNTS, "step_size = -1.0 never moves the weights"),
        ({"step_size": math.nan}, COUNTS, "step_size = nan never moves the weights"),
        ({"chi": 1.1}, COUNTS, "chi = 1.1 must be between 0"),
        ({"adjustment": -1.0}, COUNTS, "adjustment = -1.0 must be 0 or above"),
        ({"kind": "worst"}, COUNTS, 'reducer = "worst"; choose one of mean, importance, robust'),
        ({}, {"child": 7}, 'all 7 pairs are of group "child", so reducer = robust does nothing'),
        ({"kind": "importance"}, {"child": 7}, 'all 7 pairs are of group "child"'),
        ({}, {"child": 7, "clerk": 0}, 'group "clerk" has 0 training pairs; leave it out'),
        ({"kind": "mean"}, {}, "there is no group to train on"),
    ],
)
def test_settings_that_cannot_work_are_named_in_one_line(
    settings: dict[str, float], counts: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        reducer(counts=counts, **settings)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_groups_are_numbered_by_name_and_an_unknown_one_is_refused() -> None:
    assert reducer().names == ("auditor", "child", "clerk")
    assert reducer().ids_of(["clerk", "auditor", "clerk"]).tolist() == [2, 0, 2]
    with pytest.raises(InputError, match='group "boss" has no training pair; known are auditor, child, clerk'):
        reducer().ids_of(["clerk", "boss"])


def test_a_loss_that_is_no_number_stops_the_weights() -> None:
    robust = reducer()
    robust.observe(torch.tensor([1.0, math.nan]), torch.tensor([0, 1]))
    with pytest.raises(ModelError, match="lower learning_rate"):
        robust.step()


@pytest.mark.parametrize("scale", [0.69, 25.0, 2500.0])
def test_the_suggested_step_moves_weights_alike_at_every_scale_of_the_loss(scale: float) -> None:
    first = {"auditor": 1.2 * scale, "child": 0.9 * scale, "clerk": 0.9 * scale}
    robust = reducer(step_size=suggest_step_size(first))
    ids = torch.tensor([0] * 10 + [1] * 70 + [2] * 20)
    losses = torch.tensor([first[robust.names[group]] for group in ids], dtype=torch.float64)
    for _ in range(100):
        robust.observe(losses, ids)
        robust.step()
    assert math.isclose(math.log(robust.weights[0] / robust.weights[1]), 0.05 * 0.3 * 100, rel_tol=1e-9)


@pytest.mark.parametrize("losses", [{}, {"child": 0.0}, {"child": math.nan}, {"child": -1.0}])
def test_no_step_size_is_suggested_without_a_loss(losses: dict[str, float]) -> None:
    with pytest.raises(InputError):
        suggest_step_size(losses)
