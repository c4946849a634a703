"""Where neurons lie: the hot ones of a layer first, then the cold ones in an order in which few reads fetch many.

The cold order is a greedy path over co-activation (Ripple, arXiv 2410.19274): after a neuron comes the one that most
often was active together with it, so that one merged read serves several neurons of a token.
"""

import numpy as np
from numpy.typing import NDArray

from runtime.edge.records import LayerPlacement, LayerProfile, Profile
from runtime.errors import ConfigError

# A contiguous block is computed about three times as fast as gathered rows: from here on, always computing is cheaper.
HOT_FREQUENCY = 0.4
HOT_SHARE = 0.25
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
    """`cold`, most frequent first, as a path: always on to the unvisited neuron seen together most often."""
    active = np.unpackbits(layer.active, axis=1, count=len(layer.frequency))[:, cold]  # (samples, cold)
    tokens_of = [np.flatnonzero(active[:, neuron]) for neuron in range(len(cold))]
    is_free = np.ones(len(cold), dtype=bool)
    path = np.empty(len(cold), dtype=np.int64)
    here, n_started = 0, 0
    for step in range(len(cold)):
        path[step], is_free[here] = here, False
        together = active[tokens_of[here]].sum(axis=0, dtype=np.int32) * is_free
        there = int(together.argmax())
        if together[there] == 0:  # seen with nobody that is left: the most frequent one starts anew
            while n_started < len(cold) and not is_free[n_started]:
                n_started += 1
            there = n_started
        here = there
    return cold[path]


def read_runs(positions: NDArray[np.int64], gap: int, most: int) -> list[tuple[int, int, int]]:
    """Merged reads for sorted positions: (first position, records, positions served), at most `most` records each.

    Neurons up to `gap` records apart share a read: what lies between is read and thrown away.
    """
    runs: list[tuple[int, int, int]] = []
    if not len(positions):
        return runs
    breaks = np.flatnonzero(np.diff(positions) > gap + 1) + 1
    for part in np.split(positions, breaks):
        start = 0
        while start < len(part):
            stop = int(np.searchsorted(part, part[start] + most))
            runs.append((int(part[start]), int(part[stop - 1] - part[start] + 1), stop - start))
            start = stop
    return runs
