"""The sampler's law against the exact distribution."""

import math

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from runtime.decoding import sampling
from runtime.decoding.sampling import SamplingConfig, penalise, sample, top_k
from runtime.errors import ConfigError
from runtime.randomness import row_key

N_DRAWS = 20_000
LOGITS = torch.tensor([2.0, 1.5, 1.4, 0.9, 0.5, 0.0, -0.3, -1.0, -2.0, -4.0])


def draw(config: SamplingConfig) -> torch.Tensor:
    """Counts per token of N_DRAWS candidates at one position."""
    keys = torch.tensor([row_key(config.seed, "p", index) for index in range(N_DRAWS)])
    position = torch.full((N_DRAWS,), 3)
    tokens = sample(LOGITS.expand(N_DRAWS, -1), keys, position, config)
    return torch.bincount(tokens, minlength=len(LOGITS)).double()


def assert_law(counts: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Chi-square test at about five standard deviations; impossible tokens never occur."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible].double() * N_DRAWS
    statistic = ((counts[possible] - expected) ** 2 / expected).sum().item()
    freedom = int(possible.sum()) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), statistic


def test_full_vocabulary_matches_softmax() -> None:
    assert_law(draw(SamplingConfig()), LOGITS.softmax(0))


def test_temperature_matches_scaled_softmax() -> None:
    assert_law(draw(SamplingConfig(temperature=0.6, seed=1)), (LOGITS / 0.6).softmax(0))


def test_top_k_matches_renormalised_head() -> None:
    kept = LOGITS.clone()
    kept[4:] = -torch.inf
    assert_law(draw(SamplingConfig(top_k=4)), kept.softmax(0))


def test_top_p_keeps_the_smallest_sufficient_head() -> None:
    cumulative = LOGITS.softmax(0).cumsum(0)
    n_kept = int((cumulative < 0.8).sum()) + 1
    kept = LOGITS.clone()
    kept[n_kept:] = -torch.inf
    assert_law(draw(SamplingConfig(top_p=0.8)), kept.softmax(0))


def test_top_p_acts_after_top_k() -> None:
    head = LOGITS[:4].softmax(0)
    n_kept = int((head.cumsum(0) < 0.6).sum()) + 1
    kept = LOGITS.clone()
    kept[n_kept:] = -torch.inf
    assert_law(draw(SamplingConfig(top_k=4, top_p=0.6)), kept.softmax(0))


def test_top_p_head_does_not_change_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that need the whole vocabulary do not change the others, whatever the head; ties stay together."""
    torch.manual_seed(0)
    logits = (torch.randn(60, 50) * torch.linspace(0.1, 4, 60)[:, None] * 2).round() / 2
    keys = torch.tensor([row_key(0, "p", index) for index in range(60)])
    position = torch.zeros(60, dtype=torch.long)
    config = SamplingConfig(top_p=0.9)
    whole = sample(logits, keys, position, config)
    monkeypatch.setattr(sampling, "HEAD_TOKENS", 7)
    assert torch.equal(sample(logits, keys, position, config), whole)
    single = [sample(logits[i : i + 1], keys[i : i + 1], position[i : i + 1], config) for i in range(60)]
    assert torch.equal(torch.cat(single), whole)


def test_min_p_drops_what_is_unlikely_beside_the_best() -> None:
    probabilities = LOGITS.softmax(0)
    kept = LOGITS.masked_fill(probabilities < 0.3 * probabilities.max(), -torch.inf)
    assert 1 < kept.isfinite().sum() < len(LOGITS)
    assert_law(draw(SamplingConfig(min_p=0.3)), kept.softmax(0))
    assert_law(draw(SamplingConfig(min_p=0.3, top_k=9)), kept.softmax(0))


@pytest.mark.parametrize("n_vocabulary", [5_000, 32_000])
@pytest.mark.parametrize("min_p", [0.0, 0.01])
def test_a_large_vocabulary_is_drawn_by_blocks_with_the_same_law(n_vocabulary: int, min_p: float) -> None:
    """Likely tokens by themselves, all others in bins, because they are many."""
    generator = torch.Generator().manual_seed(2)
    logits = 2.5 * torch.randn(n_vocabulary, generator=generator, dtype=torch.float64)
    probabilities = logits.softmax(0)
    probabilities = probabilities.masked_fill(probabilities < min_p * probabilities.max(), 0)
    probabilities /= probabilities.sum()
    keys = torch.tensor([row_key(0, "p", index) for index in range(N_DRAWS)])
    counts = torch.zeros(n_vocabulary, dtype=torch.float64)
    for part in keys.split(500):
        tokens = sample(logits.expand(len(part), -1), part, torch.full((len(part),), 3), SamplingConfig(min_p=min_p))
        counts += torch.bincount(tokens, minlength=n_vocabulary)
    bins = torch.arange(n_vocabulary) % 40 + 100
    for place, token in enumerate(probabilities.topk(100).indices):
        bins[token] = place
    binned = torch.zeros(140, dtype=torch.float64).scatter_add_(0, bins, probabilities)
    assert_law(torch.zeros(140, dtype=torch.float64).scatter_add_(0, bins, counts), binned)


@pytest.mark.parametrize("n_values", [1, 7, 799, 800, 5_001, 32_000])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_top_k_is_that_of_torch(n_values: int, k: int) -> None:
    values = torch.randn(5, n_values, generator=torch.Generator().manual_seed(n_values))
    best, places = top_k(values, min(k, n_values))
    assert torch.equal(best, values.topk(min(k, n_values)).values)
    assert torch.equal(values.gather(-1, places), best)


def test_repetition_penalty_is_that_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 30, generator=generator)
    ids = torch.randint(0, 30, (4, 9), generator=generator)
    seen = torch.zeros(4, 30, dtype=torch.bool).scatter_(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    assert torch.equal(penalise(logits, seen, 1.7), expected)


def test_a_row_that_is_not_finite_is_marked() -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 4] = torch.nan
    logits[2, 4] = torch.inf
    keys, position = torch.arange(3), torch.zeros(3, dtype=torch.long)
    for config in (SamplingConfig(), SamplingConfig(temperature=0), SamplingConfig(top_k=3), SamplingConfig(top_p=0.9)):
        tokens = sample(logits, keys, position, config).tolist()
        assert tokens[0] >= 0 and tokens[1:] == [-1, -1], config


def test_tiny_top_p_is_greedy() -> None:
    assert draw(SamplingConfig(top_p=1e-6))[0] == N_DRAWS


def test_temperature_zero_is_greedy() -> None:
    assert draw(SamplingConfig(temperature=0))[0] == N_DRAWS


def test_truncation_keeps_the_coupling() -> None:
    """A token that survives truncation and wins without it wins with it: the noise is per token id."""
    keys = torch.tensor([row_key(0, "p", index) for index in range(500)])
    position = torch.zeros(500, dtype=torch.long)
    free = sample(LOGITS.expand(500, -1), keys, position, SamplingConfig())
    head = sample(LOGITS.expand(500, -1), keys, position, SamplingConfig(top_k=5))
    inside = free < 5
    assert inside.any() and torch.equal(free[inside], head[inside])


def test_best_of_n_follows_its_exact_law() -> None:
    """The best of n by a reward without ties has pmf F(y)^n - F(y-)^n (BOND, theorem 1)."""
    n = 4
    keys = torch.tensor([row_key(0, f"p{index // n}", index % n) for index in range(N_DRAWS * n)])
    position = torch.zeros_like(keys)
    tokens = sample(LOGITS.expand(len(keys), -1), keys, position, SamplingConfig())
    winners = tokens.view(N_DRAWS, n).amin(dim=1)  # reward: the lower id, the better
    tail = LOGITS.double().softmax(0).flip(0).cumsum(0).flip(0).clamp(max=1)  # P(token >= y)
    after = torch.cat([tail[1:], torch.zeros(1)])
    assert_law(torch.bincount(winners, minlength=len(LOGITS)).double(), tail**n - after**n)


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 0), ("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("max_new_tokens", 0)],
)
def test_impossible_settings_are_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} = {value}"):
        SamplingConfig(**{field: value})  # type: ignore[arg-type]
