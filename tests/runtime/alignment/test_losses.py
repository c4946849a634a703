import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from runtime.alignment.losses import (
    AnswerLogps,
    Losses,
    LossSettings,
    PairLogps,
    answer_logps,
    dpo,
    dpop,
    ipo,
    kto,
    needs,
    orpo,
    pair_losses,
    reference_point,
    sft,
    simpo,
    tdpo1,
    tdpo2,
    with_nll,
)
from runtime.errors import ConfigError, InputError
from tests.runtime.alignment import oracles
from tests.runtime.alignment.oracles import Oracle, Pair

Z = 1.5  # KTO's zero in the cases below
MISMATCHED = (torch.tensor([-3.0, -5.0], dtype=torch.float64), torch.tensor([-4.0, -7.0], dtype=torch.float64))
CASES: list[tuple[LossSettings, Oracle]] = [
    (LossSettings("sft"), oracles.sft()),
    (LossSettings("dpo"), oracles.dpo(0.1)),
    (LossSettings("dpo", beta=0.7, label_smoothing=0.2), oracles.dpo(0.7, 0.2)),
    (LossSettings("dpo", nll_weight=3.0), oracles.plus_nll(oracles.dpo(0.1), 3.0)),
    (LossSettings("ipo", length_norm="sum"), oracles.ipo(0.1, is_mean=False)),
    (LossSettings("ipo", beta=0.5, length_norm="mean"), oracles.ipo(0.5, is_mean=True)),
    (LossSettings("dpop"), oracles.dpop(0.3, 50.0)),
    (LossSettings("dpop", beta=0.1, dpop_lambda=5.0), oracles.dpop(0.1, 5.0)),
    (LossSettings("tdpo1"), oracles.tdpo1(0.1)),
    (LossSettings("tdpo2"), oracles.tdpo2(0.1, 0.5)),
    (LossSettings("tdpo2", beta=0.4, tdpo_alpha=2.0), oracles.tdpo2(0.4, 2.0)),
    (LossSettings("orpo"), oracles.orpo(0.1, is_sequence=False)),
    (LossSettings("orpo", orpo_lambda=1.0, sft_term="sequence"), oracles.orpo(1.0, is_sequence=True)),
    (LossSettings("simpo"), oracles.simpo(2.0, 1.0)),
    (LossSettings("simpo", beta=10.0, simpo_gamma=3.0, label_smoothing=0.1), oracles.simpo(10.0, 3.0, 0.1)),
    (LossSettings("kto"), oracles.kto(0.1, (1.0, 1.0), Z)),
    (LossSettings("kto", desirable_weight=1.3, undesirable_weight=0.5), oracles.kto(0.1, (1.3, 0.5), Z)),
]
NAMES = [f"{settings.method}-{index}" for index, (settings, _) in enumerate(CASES)]

counts = st.integers(1, 40)
per_token = st.floats(-12, -1e-3)
moves = st.floats(-20, 20)
divergences = st.floats(0, 30)


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    n_w, n_l, n_prompt = draw(counts), draw(counts), draw(counts)
    s_w, s_l = n_w * draw(per_token), n_l * draw(per_token)
    return Pair(
        s_w, s_l, s_w + draw(moves), s_l + draw(moves), n_w, n_l, draw(divergences), draw(divergences),
        s_w + n_prompt * draw(per_token), n_w + n_prompt,
    )  # fmt: skip


def as_tensors(batch: list[Pair], dtype: torch.dtype = torch.float64) -> tuple[PairLogps, PairLogps, dict[str, Tensor]]:
    """Policy, reference, and the leaves that gradients are asked of."""
    leaves = {
        name: torch.tensor([getattr(pair, name) for pair in batch], dtype=dtype, requires_grad=True)
        for name in ("S_w", "S_l", "D_w", "D_l", "A_w")
    }
    n_w, n_l, n_all = (torch.tensor([getattr(pair, name) for pair in batch]) for name in ("n_w", "n_l", "N_w"))
    ref_w, ref_l = (torch.tensor([getattr(pair, name) for pair in batch], dtype=dtype) for name in ("ref_w", "ref_l"))
    chosen = AnswerLogps(leaves["S_w"], n_w, leaves["D_w"], leaves["A_w"], n_all)
    policy = PairLogps(chosen, AnswerLogps(leaves["S_l"], n_l, leaves["D_l"]))
    return policy, PairLogps(AnswerLogps(ref_w, n_w), AnswerLogps(ref_l, n_l)), leaves


def losses_of(settings: LossSettings, batch: list[Pair]) -> Losses:
    policy, reference, _ = as_tensors(batch)
    return pair_losses(settings, policy, reference, MISMATCHED)


def close(found: float, wanted: float) -> bool:
    return math.isclose(found, wanted, rel_tol=1e-11, abs_tol=1e-9)


@pytest.mark.parametrize(("settings", "oracle"), CASES, ids=NAMES)
@given(batch=st.lists(pairs(), min_size=1, max_size=4))
def test_loss_and_gradient_agree_with_the_formula(settings: LossSettings, oracle: Oracle, batch: list[Pair]) -> None:
    policy, reference, leaves = as_tensors(batch)
    found = pair_losses(settings, policy, reference, MISMATCHED)
    found.per_sample.sum().backward()
    for index, pair in enumerate(batch):
        value, slopes = oracle(pair)
        assert close(found.per_sample[index].item(), value)
        for name, leaf in leaves.items():
            slope = 0.0 if leaf.grad is None else leaf.grad[index].item()
            assert close(slope, slopes.get(name, 0.0)), name


@pytest.mark.parametrize(("settings", "oracle"), CASES, ids=NAMES)
def test_metrics_are_per_pair_and_carry_no_gradient(settings: LossSettings, oracle: Oracle) -> None:
    found = losses_of(settings, [Pair(-3, -4, -5, -3, 2, 3, 1, 2, -9, 5)] * 3)
    assert found.per_sample.shape == (3,) and found.per_sample.requires_grad
    assert found.metrics
    for name, values in found.metrics.items():
        assert values.shape == (3,) and not values.requires_grad, name


@pytest.mark.parametrize(("settings", "oracle"), CASES, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "extreme",
    [
        Pair(-1e4, -1e-6, -1e-6, -1e4, 1, 1, 0, 1e4, -1e4, 2),
        Pair(-1e-6, -1e4, -1e4, -1e-6, 1, 1, 1e4, 0, -1e-6, 2),
        Pair(0.0, 0.0, 0.0, 0.0, 5, 5, 0, 0, 0.0, 9),
        Pair(-1e-12, 0.0, 0.0, 0.0, 3, 1, 0, 0, 0.0, 9),
        Pair(-1e4, -1e4, -1e4, -1e4, 900, 1, 1e4, 1e4, -2e4, 2000),
    ],
)
def test_extreme_log_probabilities_give_finite_numbers(
    settings: LossSettings, oracle: Oracle, extreme: Pair, dtype: torch.dtype
) -> None:
    policy, reference, leaves = as_tensors([extreme], dtype)
    found = pair_losses(settings, policy, reference, MISMATCHED)
    found.per_sample.sum().backward()
    assert found.per_sample.isfinite().all() and found.per_sample.dtype == dtype
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves.values())
    assert all(values.isfinite().all() for values in found.metrics.values())


@given(batch=st.lists(pairs(), min_size=1, max_size=4), beta=st.floats(0.01, 5))
def test_what_is_switched_off_leaves_dpo(batch: list[Pair], beta: float) -> None:
    policy, reference, _ = as_tensors(batch)
    plain = dpo(policy, reference, beta).per_sample
    assert torch.equal(dpop(policy, reference, beta, 0.0).per_sample, plain)
    assert torch.equal(tdpo2(policy, reference, beta, 0.0).per_sample, plain)
    assert torch.equal(with_nll(dpo(policy, reference, beta), policy.chosen, 0.0).per_sample, plain)
    same_kl = PairLogps(policy.chosen, replace(policy.rejected, kl=policy.chosen.kl))
    assert torch.allclose(tdpo1(same_kl, reference, beta).per_sample, plain, rtol=0, atol=1e-12)


@given(batch=st.lists(pairs(), min_size=1, max_size=4), beta=st.floats(0.01, 5))
def test_the_tdpo_variants_agree_in_value_at_alpha_one_and_differ_in_gradient(batch: list[Pair], beta: float) -> None:
    policy, reference, leaves = as_tensors(batch)
    first, second = tdpo1(policy, reference, beta).per_sample, tdpo2(policy, reference, beta, 1.0).per_sample
    assert torch.allclose(first, second, rtol=0, atol=1e-9)
    by_first = torch.autograd.grad(first.sum(), leaves["D_w"], retain_graph=True)[0]
    by_second = torch.autograd.grad(second.sum(), leaves["D_w"], allow_unused=True)[0]
    assert by_second is None and (by_first <= 0).all()


@given(batch=st.lists(pairs(), min_size=1, max_size=4))
def test_equal_policy_and_reference_start_at_log_two_with_no_accuracy(batch: list[Pair]) -> None:
    policy, _, _ = as_tensors([replace(pair, D_w=0.0, D_l=0.0) for pair in batch])
    for found in (dpo(policy, policy, 0.1), dpop(policy, policy, 0.3, 50.0), tdpo1(policy, policy, 0.1)):
        assert torch.allclose(found.per_sample, torch.full_like(found.per_sample, math.log(2)))
        assert found.metrics["rewards/accuracies"].sum() == 0
    assert torch.allclose(ipo(policy, policy, 0.1, "sum").per_sample, torch.tensor(25.0, dtype=torch.float64))


@given(batch=st.lists(pairs(), min_size=1, max_size=4), shift=st.floats(-30, 30))
def test_a_reference_that_gives_both_answers_as_much_more_changes_no_pairwise_loss(
    batch: list[Pair], shift: float
) -> None:
    moved = [replace(pair, ref_w=pair.ref_w + shift, ref_l=pair.ref_l + shift) for pair in batch]
    for settings in (LossSettings("dpo"), LossSettings("ipo", length_norm="sum"), LossSettings("tdpo2")):
        before, after = losses_of(settings, batch).per_sample, losses_of(settings, moved).per_sample
        assert torch.allclose(before, after, rtol=1e-9, atol=1e-7)


@given(batch=st.lists(pairs(), min_size=1, max_size=4))
def test_a_kto_policy_that_has_not_moved_is_neutral(batch: list[Pair]) -> None:
    policy, _, _ = as_tensors(batch)
    zero = reference_point(policy.chosen.logps, policy.chosen.logps)
    found = kto(policy, policy, 0.1, (1.0, 1.0), zero)
    assert zero == 0
    assert torch.allclose(found.per_sample, torch.full_like(found.per_sample, 0.5))
    assert found.metrics["rewards/accuracies"].sum() == 0


def test_the_zero_of_kto_is_never_negative_and_carries_no_gradient() -> None:
    policy = torch.tensor([-3.0, -5.0], requires_grad=True)
    assert reference_point(policy, torch.tensor([-4.0, -7.0])) == 1.5
    assert reference_point(policy, torch.tensor([-1.0, -2.0])) == 0
    assert not reference_point(policy, torch.tensor([-4.0, -7.0])).requires_grad
    with pytest.raises(InputError, match="two pairs or more"):
        reference_point(torch.empty(0), torch.empty(0))


@given(pair=pairs())
def test_label_smoothing_of_dpo_stops_at_its_own_confidence(pair: Pair) -> None:
    """With a share e of flipped labels the loss is least where sigmoid(beta h) = 1 - e."""
    policy, reference, leaves = as_tensors([replace(pair, S_w=pair.ref_w + math.log(0.8 / 0.2) / 0.1, S_l=pair.ref_l)])
    dpo(policy, reference, 0.1, 0.2).per_sample.sum().backward()
    assert abs(leaves["S_w"].grad.item()) < 1e-12


def test_ipo_per_token_is_not_ipo_of_the_sums() -> None:
    policy, reference, _ = as_tensors([Pair(-30, -4, -33, -3, 10, 2, 0, 0, -40, 12)])
    assert ipo(policy, reference, 0.1, "sum").per_sample.item() == pytest.approx((3 + 1 - 5) ** 2)
    assert ipo(policy, reference, 0.1, "mean").per_sample.item() == pytest.approx((0.3 + 0.5 - 5) ** 2)


def test_dpop_says_where_its_penalty_is_active() -> None:
    policy, reference, _ = as_tensors(
        [Pair(-5, -4, -3, -4, 2, 2, 0, 0, -9, 4), Pair(-2, -4, -3, -4, 2, 2, 0, 0, -9, 4)]
    )
    metrics = dpop(policy, reference, 0.3, 50.0).metrics
    assert metrics["penalty_active"].tolist() == [1, 0]
    assert metrics["penalty"].tolist() == pytest.approx([0.3 * 50 * 2, 0])


def test_the_first_step_of_dpop_is_that_of_dpo() -> None:
    """Nothing has fallen yet, so the penalty must not push."""
    slopes = []
    for weight in (0.0, 50.0):
        policy, reference, leaves = as_tensors([Pair(-3, -4, -3, -4, 2, 2, 0, 0, -9, 4)])
        dpop(policy, reference, 0.3, weight).per_sample.sum().backward()
        slopes.append(leaves["S_w"].grad.item())
    assert slopes == [-0.15, -0.15]


def test_rewards_of_tdpo_hold_the_divergence() -> None:
    policy, reference, _ = as_tensors([Pair(-5, -4, -3, -6, 2, 2, 0.5, 1.5, -9, 4)])
    metrics = tdpo2(policy, reference, 0.1, 0.5).metrics
    assert metrics["rewards/chosen"].item() == pytest.approx(0.1 * (-2 + 0.5))
    assert metrics["rewards/rejected"].item() == pytest.approx(0.1 * (2 + 1.5))
    assert metrics["kl/chosen"].item() == 0.5 and metrics["kl/rejected"].item() == 1.5


def test_preset_trl_takes_likelihoods_over_the_tokens_of_the_batch() -> None:
    batch = [Pair(-6, -4, -3, -4, 3, 2, 0, 0, -9, 4), Pair(-1, -4, -3, -4, 1, 2, 0, 0, -3, 8)]
    policy, reference, _ = as_tensors(batch)
    assert pair_losses(LossSettings("sft"), policy, None).per_sample.mean().item() == pytest.approx((2 + 1) / 2)
    assert pair_losses(LossSettings("sft", preset="trl"), policy, None).per_sample.mean().item() == pytest.approx(7 / 4)
    nll = pair_losses(LossSettings("dpo", nll_weight=1.0, preset="trl"), policy, reference).metrics["nll"]
    assert nll.mean().item() == pytest.approx(7 / 4)
    whole = pair_losses(LossSettings("orpo", preset="trl"), policy, None).metrics["nll"]
    assert whole.mean().item() == pytest.approx(12 / 12)


def test_tdpo_without_divergences_says_what_it_needs() -> None:
    answers = AnswerLogps(torch.tensor([-1.0]), torch.tensor([1]))
    for settings in (LossSettings("tdpo1"), LossSettings("tdpo2")):
        assert needs(settings).reference == "logits"
        with pytest.raises(ConfigError, match="logits at every step, not stored log-probabilities"):
            pair_losses(settings, PairLogps(answers, answers), PairLogps(answers, answers))


def test_what_a_loss_needs_is_what_it_uses() -> None:
    """A loss works on exactly what `needs` says, and not without it."""
    policy, reference, _ = as_tensors([Pair(-5, -4, -3, -6, 2, 2, 0.5, 1.5, -9, 4)])
    bare = PairLogps(replace(policy.chosen, all_logps=None, n_all=None), policy.rejected)
    for settings, _ in CASES:
        asked = needs(settings)
        given_policy = policy if asked.whole_sequence else bare
        if not asked.rejected:
            given_policy = PairLogps(given_policy.chosen, None)
        given_reference = None if asked.reference == "none" else reference
        found = pair_losses(settings, given_policy, given_reference, MISMATCHED if asked.mismatched else None)
        assert found.per_sample.isfinite().all()
        if asked.mismatched or asked.whole_sequence or asked.reference != "none":
            with pytest.raises(AssertionError):
                pair_losses(settings, bare, None, None)


@pytest.mark.parametrize("found", [sft, simpo, orpo], ids=lambda loss: loss.__name__)
def test_reference_free_losses_fall_as_the_chosen_answer_grows_likelier(found: object) -> None:
    def value(s_w: float) -> float:
        policy, _, _ = as_tensors([Pair(s_w, -4, 0, 0, 2, 2, 0, 0, -9, 4)])
        if found is sft:
            return sft(policy.chosen).per_sample.item()
        losses = simpo(policy, 2.0, 1.0) if found is simpo else orpo(policy, 0.1, "answer")
        return losses.per_sample.item()

    assert value(-1.0) < value(-2.0) < value(-8.0)


def test_answer_logps_sum_only_answer_tokens() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)
    token_ids = torch.randint(0, 11, (2, 5), generator=generator)
    is_answer = torch.tensor([[False, False, True, True, False], [False, True, True, True, True]])
    found = answer_logps(logits, token_ids, is_answer)
    log_probabilities = logits.log_softmax(-1)
    for row in range(2):
        wanted = sum(log_probabilities[row, t - 1, token_ids[row, t]] for t in range(1, 5) if is_answer[row, t])
        assert abs(found[row] - wanted) < 1e-9
