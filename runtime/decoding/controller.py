"""How many tokens to draft: the number that promises most tokens per second, by measured times and acceptance.

It decides about speed only. Nothing of a text depends on it where the acceptance rule is the coupled one. So real
rounds are what is timed: while it tries a number of drafts, the answers go on.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log2
from statistics import median, median_low

GAIN_TO_START = 1.1  # over plain decoding
GAIN_TO_STAY = 1.06  # rows of unequal length cost a little that no single round shows
MEMORY = 0.99  # of what was accepted, per round
PRIOR = (0.8, 4.0)  # acceptance that is assumed at first, and as if so many drafts had been seen
# Before anything is timed: tokens that cost as much as a pass without any, and the share of a pass that drafting costs.
KNEE, KEPT = 32.0, 0.4
RECENT = 9  # rounds of a size and a number of drafts, whose median counts
ENOUGH = 3  # rounds that a price is believed from; two where it leaves no hope
NEXT_TO = 3  # plain rounds that a round with drafts is compared with
TRY_AGAIN = 128  # rounds of a size after which the other way, drafts or none, is tried: times and texts change
UNCLEAR = (0.8, 1.6)  # a gain foreseen from other sizes that is worth a trial
BETWEEN = 15  # times between rounds whose median counts; a prefill or a reward is not one of them

Size = tuple[int, int]  # of a batch: rows and slots, powers of two


@dataclass(slots=True)
class Timed:
    """A round that drafted k tokens, and the plain rounds of its size next to it.

    What slows a machine down for a minute slows both, and not the plain rounds of another minute.
    """

    k: int
    seconds: float
    before: float | None
    after: list[float] = field(default_factory=list)

    @property
    def price(self) -> float | None:
        """In plain rounds; None while there was none."""
        plain = median(self.after) if self.after else self.before
        return self.seconds / plain if plain else None


@dataclass(slots=True)
class Acceptance:
    """How often the draft at each place stays when all before it did; old rounds count less and less."""

    k: int
    known: Sequence[float] = ()  # by place, as measured elsewhere
    reached: list[float] = field(init=False)
    accepted: list[float] = field(init=False)

    def __post_init__(self) -> None:
        rate, weight = PRIOR
        self.reached = [weight] * self.k
        assumed = self.known or [rate ** (1 + place / 2) for place in range(self.k)]
        self.accepted = [weight * one for one in assumed[: self.k]]

    def fade(self) -> None:
        """Forget a little in a round that drafts nothing, so that after many of them the next draft counts."""
        if max(self.reached) > PRIOR[1]:
            self.reached = [MEMORY * one for one in self.reached]
            self.accepted = [MEMORY * one for one in self.accepted]

    def observe(self, reached: Sequence[float], accepted: Sequence[float]) -> None:
        """Drafts of one round by place: those whose predecessors all stayed, and those that stayed themselves."""
        for place, (tried, stayed) in enumerate(zip(reached, accepted, strict=True)):
            if tried:
                self.reached[place] = MEMORY * self.reached[place] + tried
                self.accepted[place] = MEMORY * self.accepted[place] + stayed

    @property
    def rates(self) -> list[float]:
        """By place."""
        return [stayed / tried for stayed, tried in zip(self.accepted, self.reached, strict=True)]

    def tokens(self) -> list[float]:
        """Expected tokens of a round that drafts 0, 1, ... k."""
        expected, chance = [1.0], 1.0
        for rate in self.rates:
            chance *= rate
            expected.append(expected[-1] + chance)
        return expected


class Controller:
    """Chooses before each round, and learns from it."""

    def __init__(self, k: int, known: Sequence[float] = ()) -> None:
        """k: tokens at most; known: acceptance by place, where it was measured before."""
        self.k = k
        self.acceptance = Acceptance(k, known)
        self.gaps: deque[float] = deque(maxlen=BETWEEN)  # seconds between rounds
        self.is_on = True
        self._plain: defaultdict[Size, deque[float]] = defaultdict(lambda: deque(maxlen=NEXT_TO))
        self._drafted: defaultdict[tuple[Size, int], deque[Timed]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._open: defaultdict[Size, list[Timed]] = defaultdict(list)  # that more plain rounds are compared with
        self._prices: dict[tuple[Size, int], float] = {}  # of rounds that draft, in plain rounds of their size
        self._nearest: dict[tuple[Size, int], tuple[Size, int]] = {}
        self._n_since: Counter[tuple[Size, bool]] = Counter()  # rounds since such a size was decoded so

    def choose(self, rooms: Sequence[int], n_slots: int) -> int:
        """Tokens to draft when row i may get `rooms[i]` and rows have `n_slots` places."""
        size = size_of(len(rooms), n_slots)
        prices = [1.0, *(self.price(size, k) for k in range(1, self.k + 1))]
        expected = self.acceptance.tokens()
        gains = [e / price for e, price in zip(expected, prices, strict=True)]
        best = max(range(1, self.k + 1), key=gains.__getitem__)
        self.is_on = gains[best] > (GAIN_TO_STAY if self.is_on else GAIN_TO_START)
        most = min(self.k, max(rooms) - 1)
        if most == 0:
            return 0
        best = min(best, most)
        trial = self._trial(size, best, most, gains[best])
        if trial is not None or not self.is_on:
            return trial or 0
        # Rows that wait, or nearly do, make a long draft less worth.
        rates = [sum(expected[min(k, room - 1)] for room in rooms if room) / prices[k] for k in range(most + 1)]
        return max(range(len(rates)), key=rates.__getitem__)

    def observe(self, n_rows: int, n_slots: int, k: int, seconds: float, n_rounds: int = 1) -> None:
        """What `n_rounds` of some rows took that drafted k tokens."""
        size = size_of(n_rows, n_slots)
        seconds = (seconds + (median(self.gaps) if self.gaps else 0.0)) / n_rounds
        self._n_since[size, k > 0] = 0
        self._n_since[size, k == 0] += n_rounds
        if k == 0:
            self._observe_plain(size, seconds)
            return
        timed = Timed(k, seconds, median(self._plain[size]) if self._plain[size] else None)
        self._drafted[size, k].append(timed)
        self._open[size].append(timed)
        self._set_price(size, k)

    def _observe_plain(self, size: Size, seconds: float) -> None:
        self.acceptance.fade()
        self._plain[size].append(seconds)
        waiting = self._open.pop(size, [])
        for timed in waiting:
            timed.after.append(seconds)
        if left := [timed for timed in waiting if len(timed.after) < NEXT_TO]:
            self._open[size] = left
        for k in {timed.k for timed in waiting}:
            self._set_price(size, k)

    def _set_price(self, size: Size, k: int) -> None:
        known = [price for one in self._drafted[size, k] if (price := one.price) is not None]
        if known:
            if (size, k) not in self._prices:
                self._nearest.clear()
            self._prices[size, k] = median_low(known)

    def price(self, size: Size, k: int) -> float:
        """Of a round that drafts k tokens, in plain rounds: as measured, or of what is most like it that was."""
        found = self._prices.get((size, k))
        if found is not None or not self._prices:
            return found or _assumed(size, k)
        if (size, k) not in self._nearest:
            self._nearest[size, k] = min(self._prices, key=lambda seen: _distance(seen, (size, k)))
        near = self._nearest[size, k]
        return self._prices[near] * _assumed(size, k) / _assumed(*near)

    def _trial(self, size: Size, best: int, most: int, gain: float) -> int | None:
        """Tokens to draft for the sake of knowing; None where enough is known."""
        if self._n_since[size, True] >= TRY_AGAIN:
            return best
        if self._n_since[size, False] >= TRY_AGAIN:
            return 0
        n_drafted, n_plain = len(self._drafted.get((size, best), ())), len(self._plain.get(size, ()))
        is_foreseen = self._prices and (size, best) not in self._prices
        if is_foreseen and not UNCLEAR[0] < gain < UNCLEAR[1]:
            return None
        if min(n_drafted, n_plain) < (ENOUGH if gain > UNCLEAR[0] else 2):
            return best if n_drafted <= n_plain else 0
        others = (k for k in (best + 1, best - 1) if 1 <= k <= most and (size, k) not in self._prices)
        return next(others, None) if gain > UNCLEAR[0] else None


def size_of(n_rows: int, n_slots: int) -> Size:
    """Batches of one size take the same time, nearly."""
    return round(log2(n_rows)), round(log2(n_slots))


def _assumed(size: Size, k: int) -> float:
    """Price of a round before anything was timed."""
    rows = float(2 ** size[0])
    return (KNEE + rows * (k + 1)) * (1 + KEPT) / (KNEE + rows)


def _distance(one: tuple[Size, int], other: tuple[Size, int]) -> tuple[int, int]:
    (size, k), (other_size, other_k) = one, other
    return sum(abs(a - b) for a, b in zip(size, other_size, strict=True)), abs(k - other_k)
