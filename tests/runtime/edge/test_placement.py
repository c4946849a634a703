import numpy as np
import pytest

from runtime.edge.placement import place
from runtime.edge.records import FfnShape, LayerProfile, Profile
from runtime.errors import ConfigError


def _profile(active: np.ndarray) -> Profile:
    layer = LayerProfile(active.mean(axis=0).astype(np.float32), 0.0, np.packbits(active, axis=1))
    return Profile(FfnShape(1, 8, active.shape[1], "relu"), (layer,), len(active))


def _families(n_neurons: int = 96, n_families: int = 8, n_tokens: int = 400) -> np.ndarray:
    """Neurons n and n + 8 are active together; the first 16 always are."""
    rng = np.random.default_rng(0)
    family = np.arange(n_neurons) % n_families
    active = family[None] == rng.integers(0, n_families, n_tokens)[:, None]
    active[:, :16] = True
    return active


def test_hot_neurons_come_first_and_every_neuron_has_one_place() -> None:
    (found,) = place(_profile(_families()))
    assert found.n_hot == 16
    assert sorted(found.order[:16]) == list(range(16))
    assert sorted(found.order) == list(range(96))


def test_the_hot_share_bounds_the_hot_block() -> None:
    (found,) = place(_profile(_families()), hot_share=0.1)
    assert found.n_hot == 8


def test_neurons_that_are_active_together_lie_together() -> None:
    (found,) = place(_profile(_families()))
    cold = found.order[16:] % 8
    assert (np.diff(cold) != 0).sum() == 7  # each family in one piece
    (plain,) = place(_profile(_families()), by_activity=False)
    assert list(plain.order[16:]) == list(range(16, 96))


def test_neurons_that_never_were_active_are_placed_too() -> None:
    active = _families()
    active[:, 20:40] = False
    (found,) = place(_profile(active))
    assert sorted(found.order) == list(range(96))


def test_a_share_above_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="hot_share = 2"):
        place(_profile(_families()), hot_share=2)
