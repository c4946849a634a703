"""The adaptive policy's integrals against simulation, and what follows from them."""

import re

import pytest
import torch

from runtime.decoding.adaptive import AdaptiveCuts, Fit, expected_gain, win_chances
from runtime.errors import ConfigError
from runtime.records import Cut

MEANS = torch.tensor([1.0, 0.4, 0.3, -0.5, -2.0], dtype=torch.float64)


@pytest.mark.parametrize("threshold", [None, 0.0, 1.5])
@pytest.mark.parametrize("residual", [0.2, 1.0])
def test_win_chances_are_those_of_a_simulation(residual: float, threshold: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = MEANS + residual * torch.randn(200_000, 5, generator=generator, dtype=torch.float64)
    best = draws.max(dim=1)
    wins = torch.ones(len(draws), dtype=torch.bool) if threshold is None else best.values > threshold
    simulated = torch.stack([((best.indices == i) & wins).double().mean() for i in range(5)])
    assert torch.allclose(win_chances(MEANS, residual, threshold), simulated, atol=4e-3)


@pytest.mark.parametrize(("best", "n"), [(0.0, 1), (1.0, 8), (3.0, 64), (-2.0, 4)])
def test_expected_gain_is_that_of_a_simulation(best: float, n: int) -> None:
    generator = torch.Generator().manual_seed(1)
    draws = 0.5 + 1.5 * torch.randn(100_000, n, generator=generator, dtype=torch.float64)
    simulated = float((draws.max(dim=1).values - best).clamp(min=0).mean())
    assert expected_gain(0.5, 1.5, best, n) == pytest.approx(simulated, abs=0.02)


def policy(residual: float, confidence: float = 0.95, **options: float) -> AdaptiveCuts:
    return AdaptiveCuts((Fit(8, 0.0, 1.0, residual),), confidence, **options)  # type: ignore[arg-type]


def test_more_stay_when_partial_scores_say_less() -> None:
    running = dict(enumerate([2.0, 1.0, 0.5, 0.0, -1.0, -2.0]))
    kept = [len(policy(residual).kept(0, running, {})) for residual in (0.01, 0.5, 1.0, 5.0)]
    assert kept[0] == 1 and kept == sorted(kept) and kept[-1] >= 5
    assert policy(0.5).kept(0, running, {}) == set(range(kept[1]))


def test_more_stay_for_more_confidence() -> None:
    running = dict(enumerate([2.0, 1.0, 0.5, 0.0, -1.0, -2.0]))
    kept = [len(policy(1.0, confidence).kept(0, running, {})) for confidence in (0.3, 0.8, 0.99, 1.0)]
    assert kept == sorted(kept) and kept[0] < kept[-1] == 6


def test_an_unbeatable_finished_answer_ends_the_others() -> None:
    running = {0: 0.0, 1: 0.3, 2: -1.0}
    assert policy(0.1).kept(0, running, {5: 4.0, 6: 3.0}) == {5}
    assert policy(0.1).kept(0, running, {5: -4.0}) == {5, 1}


def test_a_better_answer_in_hand_makes_more_draws_less_worth() -> None:
    waves = policy(1.0, first_wave=4, min_gain=0.1)
    cuts = {index: [Cut(8, score, True)] for index, score in enumerate([0.0, 0.5, -0.5, 1.0])}
    assert waves.is_worth_more(cuts, {3: 0.0}, 4)
    assert not waves.is_worth_more(cuts, {3: 6.0}, 4)
    assert waves.is_worth_more(cuts, {}, 4)
    assert (waves.n_first(16), waves.n_first(3), policy(1.0).n_first(16)) == (4, 3, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fits": ()}, "need a calibration"),
        ({"confidence": 0.0}, "confidence = 0.0"),
        ({"first_wave": 1}, "first_wave = 1"),
        ({"min_gain": -1.0}, "min_gain = -1.0"),
        ({"fits": (Fit(8, 0, 1, 1), Fit(4, 0, 1, 1))}, "strictly increasing"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        AdaptiveCuts(**{"fits": (Fit(8, 0, 1, 1),)} | settings)  # type: ignore[arg-type]


def test_a_fit_that_predicts_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="slope at 8 tokens is -1.0"):
        Fit(8, 0.0, -1.0, 1.0)
