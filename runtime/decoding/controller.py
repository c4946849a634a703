"""How many tokens to draft: the number that promises most tokens per second, by measured times and acceptance.

It decides about speed only. Nothing of a text depends on it where the acceptance rule is the coupled one.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import log2
from statistics import median

GAIN_TO_START = 1.1  # over plain decoding
GAIN_TO_STAY = 1.06  # rows of unequal length cost a little that no single round shows
MEMORY = 0.99  # of what was accepted, per round
PRIOR = (0.8, 4.0)  # acceptance that is assumed at first, and as if so many drafts had been seen
REPEATS = 3  # of each timed pass; the fastest counts
TRY_AGAIN = 128  # plain rounds after which one is drafted, to see whether acceptance has changed
# Rounds of a size after which all are timed once more: the first time may have met a slow moment of the machine.
TIME_AGAIN = frozenset({32, 128, 512, 2048})

Measure = Callable[[int], float]  # drafted tokens -> seconds of a round


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
    """Chooses before each round."""

    def __init__(self, k: int, known: Sequence[float] = ()) -> None:
        """k: tokens at most; known: acceptance by place, where it was measured before."""
        self.k = k
        self.acceptance = Acceptance(k, known)
        self.seconds: dict[tuple[int, int], list[float]] = {}  # of rounds by drafted tokens, per size of the batch
        self._n_rounds: Counter[tuple[int, int]] = Counter()
        self.gaps: deque[float] = deque(maxlen=15)  # seconds between rounds
        self.is_on = True
        self._n_plain = 0

    def choose(self, rooms: Sequence[int], n_slots: int, measure: Measure) -> int:
        """Tokens to draft when row i may get `rooms[i]` and rows have `n_slots` places. Sizes that it has not met
        are measured."""
        key = round(log2(len(rooms))), round(log2(n_slots))
        self._measure(key, measure)
        seconds = self.times(key)
        expected = self.acceptance.tokens()
        gain = max(e * seconds[0] / s for e, s in zip(expected[1:], seconds[1:], strict=True))
        self.is_on = gain > (GAIN_TO_STAY if self.is_on else GAIN_TO_START)
        self._n_plain = 0 if self.is_on else self._n_plain + 1
        if not self.is_on and self._n_plain % TRY_AGAIN:
            return 0
        # Rows that wait, or nearly do, make a long draft less worth.
        rates = [
            sum(expected[min(k, room - 1)] for room in rooms if room) / seconds[k]
            for k in range(min(self.k, max(rooms) - 1) + 1)
        ]
        return max(range(len(rates)), key=rates.__getitem__)

    def _measure(self, size: tuple[int, int], measure: Measure) -> None:
        """Sizes that it has not met are timed; the fastest that was ever seen counts."""
        if size not in self.seconds:
            self.seconds[size] = _time_rounds(self.k, measure, REPEATS)
        elif self._n_rounds[size] in TIME_AGAIN:
            found = _time_rounds(self.k, measure, 1)
            self.seconds[size] = [min(both) for both in zip(self.seconds[size], found, strict=True)]
        self._n_rounds[size] += 1

    def times(self, size: tuple[int, int]) -> list[float]:
        """Seconds from one round to the next by drafted tokens, for a size of the batch that was measured."""
        gap = median(self.gaps) if self.gaps else 0.0
        return [gap + one for one in self.seconds[size]]


def _time_rounds(k_most: int, measure: Measure, repeats: int) -> list[float]:
    """Seconds for 0 to k_most drafted tokens; some are timed in turn, those between lie on a line."""
    timed = sorted({0, 1, min(3, k_most), k_most})
    for k in timed if repeats > 1 else ():  # the first time warms up
        measure(k)
    found = {k: float("inf") for k in timed}
    for _ in range(repeats):
        for k in timed:
            found[k] = min(found[k], measure(k))
    seconds = []
    for k in range(k_most + 1):
        below, above = max(t for t in timed if t <= k), min(t for t in timed if t >= k)
        share = (k - below) / (above - below) if above > below else 0.0
        seconds.append(found[below] + share * (found[above] - found[below]))
    return seconds
