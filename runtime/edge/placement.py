"""Where neurons lie: the hot ones of a layer first, then the cold ones in an order in which few reads fetch many.

The cold order is a greedy path over co-activation (Ripple, arXiv 2410.19274): after a neuron comes the one that
shares most of its tokens, so that one merged read serves several neurons of a token.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.edge.records import LayerPlacement, LayerProfile, Profile
from runtime.errors import ConfigError
from runtime.hardware import factor_dtype

# A contiguous block is computed about three times as fast as gathered rows: from here on, always computing is cheaper.
HOT_FREQUENCY = 0.4
HOT_SHARE = 0.25
MOST_SAMPLES, N_NEIGHBOURS, AT_ONCE, FEW_TOKENS = 2048, 64, 512, 4
ROUND = 8  # the hot block has a multiple of so many neurons


def place(
    profile: Profile, hot_frequency: float = HOT_FREQUENCY, hot_share: float = HOT_SHARE, by_activity: bool = True
) -> tuple[LayerPlacement, ...]:
    """The order of every layer's neurons; hot are those active in `hot_frequency` of tokens, `hot_share` at most.

    `by_activity` False leaves the cold ones in the model's own order, to compare with.
    """
    if not 0 < hot_frequency <= 1 or not 0 <= hot_share <= 1:
        raise ConfigError(
            f"hot_frequency = {hot_frequency} and hot_share = {hot_share} must be shares between 0 and 1; "
            f"the defaults are {HOT_FREQUENCY} and {HOT_SHARE}"
        )
    return tuple(_place(layer, hot_frequency, hot_share, by_activity) for layer in profile.layers)


def _place(layer: LayerProfile, hot_frequency: float, hot_share: float, by_activity: bool) -> LayerPlacement:
    n_neurons = len(layer.frequency)
    by_frequency = np.argsort(-layer.frequency, kind="stable").astype(np.int64)
    n_wanted = min(int((layer.frequency >= hot_frequency).sum()), int(hot_share * n_neurons))
    n_hot = n_wanted // ROUND * ROUND
    hot, cold = np.sort(by_frequency[:n_hot]), by_frequency[n_hot:]
    path = _path(layer, cold) if by_activity and len(layer.active) else np.sort(cold)
    return LayerPlacement(np.concatenate([hot, path]), n_hot)


def _path(layer: LayerProfile, cold: NDArray[np.int64]) -> NDArray[np.int64]:
    """`cold`, most frequent first, as a path: always on to the nearest unvisited neuron."""
    active = np.unpackbits(layer.active[:MOST_SAMPLES], axis=1, count=len(layer.frequency))[:, cold]
    neighbours = _neighbours(active)
    is_free = np.ones(len(cold), dtype=bool)
    path = np.empty(len(cold), dtype=np.int64)
    here, n_started = 0, 0
    for step in range(len(cold)):
        path[step], is_free[here] = here, False
        free = neighbours[here][is_free[neighbours[here]]]
        if len(free):
            here = int(free[0])
            continue
        while n_started < len(cold) and not is_free[n_started]:  # the most frequent one that is left starts anew
            n_started += 1
        here = n_started
    return cold[path]


def _neighbours(active: NDArray[np.uint8]) -> list[NDArray[np.int64]]:
    """For each neuron (column) those it shares most of its tokens with, nearest first; `N_NEIGHBOURS` at most.

    Shared tokens alone would tie everybody to the most frequent neurons, which the cache holds anyway.
    """
    tokens = torch.from_numpy(active).to(factor_dtype(torch.bfloat16))  # zeros and ones: sums are exact inside
    uses = tokens.sum(dim=0, dtype=torch.float32)
    n_most = min(N_NEIGHBOURS, len(uses))
    found: list[NDArray[np.int64]] = []
    for start in range(0, len(uses), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        shared = (tokens[:, part].T @ tokens).float()
        shared[torch.arange(len(shared)), torch.arange(start, start + len(shared))] = 0  # with itself
        # The share of tokens of either that are tokens of both; a few tokens prove little.
        nearest = (shared / (uses[part, None] + uses[None] - shared + FEW_TOKENS)).topk(n_most, dim=1)
        for closeness, ids in zip(nearest.values, nearest.indices, strict=True):
            found.append(ids[closeness > 0].numpy())
    return found
