"""Which cold neurons of a layer are in memory: slots, the least recently used of which are evicted in batches."""

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
EVICTED_AT_ONCE = 1 / 16  # of the slots: one search for victims serves several tokens
_FREE = np.iinfo(np.int64).max


class LayerCache:
    """The slots of one layer. Neurons are counted from its first cold one, slots from its first slot."""

    def __init__(self, n_cold: int, n_slots: int) -> None:
        self.n_slots = n_slots
        self.slot_of = np.full(n_cold, -1, dtype=np.int32)
        self.owner = np.full(n_slots, -1, dtype=np.int32)
        self.last_use = np.full(n_slots, _FREE, dtype=np.int64)
        self.is_whole = np.zeros(n_slots, dtype=bool)  # with up and down, not the gate alone
        self.free = np.arange(n_slots)[::-1].copy()
        self.n_free = n_slots

    def claim(self, wanted: Indices, tick: int) -> tuple[Indices, Indices]:
        """The slots of `wanted`, and the places in it of those that were not there and must be read.

        Nobody wanted at `tick` is evicted, so `wanted` may have `n_slots` neurons at most.
        """
        slots = self.slot_of[wanted].astype(np.int64)
        missing = np.flatnonzero(slots < 0)
        self.last_use[slots[slots >= 0]] = tick
        if len(missing):
            fresh = self._take(len(missing), tick)
            self.slot_of[wanted[missing]] = fresh
            self.owner[fresh] = wanted[missing]
            self.last_use[fresh] = tick
            self.is_whole[fresh] = False
            slots[missing] = fresh
        return slots, missing

    def has_room(self, n: int) -> bool:
        """Whether `n` neurons fit without evicting anybody."""
        return n <= self.n_free

    def n_old(self, tick: int) -> int:
        """How many neurons `claim` could bring in at `tick`."""
        return self.n_free + int((self.last_use < tick).sum())

    def forget(self) -> None:
        """Empty every slot."""
        self.__init__(len(self.slot_of), self.n_slots)  # type: ignore[misc]

    def _take(self, n: int, tick: int) -> Indices:
        if self.n_free < n:
            self._evict(n - self.n_free, tick)
        self.n_free -= n
        return self.free[self.n_free : self.n_free + n].copy()

    def _evict(self, needed: int, tick: int) -> None:
        n = min(max(needed, int(EVICTED_AT_ONCE * self.n_slots)), self.n_slots)
        oldest = np.argpartition(self.last_use, n - 1)[:n]
        victims = oldest[self.last_use[oldest] < tick]
        assert len(victims) >= needed
        self.slot_of[self.owner[victims]] = -1
        self.owner[victims] = -1
        self.last_use[victims] = _FREE
        self.free[self.n_free : self.n_free + len(victims)] = victims
        self.n_free += len(victims)
