"""The hash noise: reproducible, batch free, Gumbel distributed."""

import math

import torch

from runtime.randomness import gumbel, row_key


def test_row_keys_differ_by_every_part() -> None:
    parts = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a1", 1), (11, "a", 0)]
    keys = {row_key(*part) for part in parts}
    assert len(keys) == len(parts)
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_values_are_pinned() -> None:
    """A change of the hash would silently change every dataset version: it must be on purpose."""
    assert row_key(0, "prompt", 3) == -3235191563647444872
    noise = gumbel(torch.tensor([row_key(0, "prompt", 3)]), torch.tensor([5]), torch.tensor([[0, 1, 999]]))
    torch.testing.assert_close(noise, torch.tensor([[0.249456, 0.485357, -0.364254]]), rtol=1e-5, atol=1e-5)


def test_noise_does_not_depend_on_batch_or_support() -> None:
    keys = torch.tensor([row_key(7, "p", index) for index in range(9)])
    position = torch.arange(9) * 3
    whole = gumbel(keys, position, 50)
    some = torch.tensor([[4, 49, 0]]).expand(2, -1)
    assert torch.equal(gumbel(keys[3:5], position[3:5], some), whole[3:5][:, [4, 49, 0]])


def test_inputs_are_left_alone() -> None:
    keys, position, ids = torch.tensor([5]), torch.tensor([6]), torch.tensor([[7, 8]])
    gumbel(keys, position, ids)
    assert (keys.item(), position.item(), ids.tolist()) == (5, 6, [[7, 8]])


def test_moments_and_quantiles_are_gumbel() -> None:
    keys = torch.tensor([row_key(0, "p", index) for index in range(400)])
    noise = gumbel(keys, torch.zeros(400, dtype=torch.long), 500).double().flatten()
    n = noise.numel()
    assert abs(noise.mean().item() - 0.57721566) < 5 * math.pi / math.sqrt(6 * n)
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.05
    for probability in (0.001, 0.1, 0.5, 0.9, 0.999):
        below = (noise <= -math.log(-math.log(probability))).double().mean().item()
        assert abs(below - probability) < 5 * math.sqrt(probability * (1 - probability) / n)


def test_neighbouring_counters_are_uncorrelated() -> None:
    key = torch.tensor([row_key(0, "p", 0)])
    rows = torch.cat([gumbel(key, torch.tensor([position]), 1000) for position in range(50)])
    correlation = torch.corrcoef(rows).fill_diagonal_(0).abs().max().item()
    assert correlation < 5.5 / math.sqrt(1000)
    assert abs(torch.corrcoef(torch.stack([rows[:, :-1].flatten(), rows[:, 1:].flatten()]))[0, 1].item()) < 0.02
