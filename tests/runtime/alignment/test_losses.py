import math

import torch

from runtime.alignment.losses import PairLogps, answer_logps, dpo, sft, with_nll


def _random_pairs(seed: int) -> tuple[PairLogps, PairLogps]:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(7, generator=generator, dtype=torch.float64) * 5 for _ in range(4)]
    return PairLogps(draw[0], draw[1]), PairLogps(draw[2], draw[3])


def test_dpo_agrees_with_the_formula_in_float64() -> None:
    policy, reference = _random_pairs(0)
    for beta, smoothing in ((0.1, 0.0), (0.5, 0.2)):
        losses = dpo(policy, reference, beta, smoothing).per_sample
        for i in range(7):
            h = (policy.chosen[i] - reference.chosen[i]) - (policy.rejected[i] - reference.rejected[i])
            right = -math.log(1 / (1 + math.exp(-beta * h)))
            flipped = -math.log(1 / (1 + math.exp(beta * h)))
            assert abs(losses[i].item() - ((1 - smoothing) * right + smoothing * flipped)) < 1e-9


def test_label_smoothing_changes_the_loss() -> None:
    policy, reference = _random_pairs(1)
    assert not torch.allclose(dpo(policy, reference, 0.1).per_sample, dpo(policy, reference, 0.1, 0.1).per_sample)


def test_dpo_starts_at_log_two_with_no_accuracy() -> None:
    policy, _ = _random_pairs(2)
    found = dpo(policy, policy, 0.1)
    assert torch.allclose(found.per_sample, torch.full((7,), math.log(2), dtype=torch.float64))
    assert found.metrics["rewards/accuracies"].sum() == 0


def test_the_gradient_raises_chosen_and_lowers_rejected() -> None:
    policy, reference = _random_pairs(3)
    chosen, rejected = policy.chosen.requires_grad_(), policy.rejected.requires_grad_()
    dpo(PairLogps(chosen, rejected), reference, 0.1).per_sample.sum().backward()
    assert (chosen.grad < 0).all()
    assert (rejected.grad > 0).all()


def test_the_likelihood_term_is_added_per_token() -> None:
    policy, reference = _random_pairs(5)
    plain, n_tokens = dpo(policy, reference, 0.1), torch.full((7,), 4)
    found = with_nll(plain, policy.chosen, n_tokens, 3.0).per_sample
    assert torch.allclose(found, plain.per_sample - 3.0 * policy.chosen / 4)


def test_sft_is_the_mean_negative_log_likelihood_per_token() -> None:
    losses = sft(torch.tensor([-6.0, -1.0]), torch.tensor([3, 2])).per_sample
    assert losses.tolist() == [2.0, 0.5]


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
