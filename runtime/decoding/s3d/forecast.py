"""What S3D is worth on this machine before anything is drawn: measured rounds, and acceptance measured in training."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from statistics import median

from runtime.decoding.controller import Acceptance, Controller
from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutSchedule
from runtime.decoding.s3d.adapter import S3DAdapter
from runtime.decoding.s3d.rounds import Clock, S3DDecoding, S3DRounds
from runtime.decoding.sampling import SamplingConfig
from runtime.errors import InputError, ModelError
from runtime.models import LoadedModel, PromptFormat
from runtime.records import Prompt

N_TIMED = 5  # rounds at least of each number of drafts


@dataclass(frozen=True, slots=True)
class Forecast:
    """Decoding `rows` answers together: the best number of drafts (0: plain decoding is faster), tokens per round with
    so many, E, the E from which they would pay, and the predicted speed-up over plain decoding."""

    rows: int
    k: int
    tokens_per_round: float
    break_even: float
    speedup: float


def forecast(
    policy: LoadedModel,
    adapter: S3DAdapter,
    prompt: Prompt,
    rows: Sequence[int],
    clock: Clock,
    prompt_format: PromptFormat = "chat",
) -> list[Forecast]:
    """One per number of rows; each takes some thirty rounds. ModelError for an adapter of unknown acceptance."""
    rates = adapter.config.rates
    if not rates:
        raise ModelError("the S3D adapter does not say how often its drafts are accepted; run `winnow adapt`")
    expected = Acceptance(adapter.config.k, rates).tokens()
    found = []
    for n in rows:
        s3d = S3DDecoding(adapter, clock=clock)  # a new one, which has measured nothing yet
        found.append(_best(n, expected, round_seconds(policy, s3d, prompt, n, prompt_format)))
    return found


def round_seconds(
    policy: LoadedModel, s3d: S3DDecoding, prompt: Prompt, rows: int, prompt_format: PromptFormat = "chat"
) -> list[float]:
    """Seconds from round to round by drafted tokens, while `rows` answers to `prompt` begin."""
    turns = InTurn(s3d.adapter.config.k, rows)
    n_tokens = 1 + N_TIMED * sum(k + 1 for k in turns.timed)
    engine = Engine(
        policy, SamplingConfig(n=rows, max_new_tokens=n_tokens), CutSchedule(), None, rows, prompt_format, s3d=s3d
    )
    assert isinstance(engine.steps, S3DRounds)
    engine.steps.controller = turns
    engine.is_stop[:] = False  # all rows go on
    [answers] = engine.generate([prompt])
    if not turns.found:
        raise InputError(f"no round can be timed: {answers[0].error}")
    return turns.seconds()


class InTurn(Controller):
    """Drafts 0, 1, 3 and k tokens by turns and keeps what rounds of all `rows` took."""

    def __init__(self, k: int, rows: int) -> None:
        super().__init__(k)
        self.rows = rows
        self.timed = sorted({0, 1, min(3, k), k})
        self.found: defaultdict[int, list[float]] = defaultdict(list)
        self._turn = cycle(self.timed)

    def choose(self, rooms: Sequence[int], n_slots: int) -> int:
        """The next one's turn."""
        return next(self._turn)

    def observe(self, n_rows: int, n_slots: int, k: int, seconds: float, n_rounds: int = 1) -> None:
        """See Controller."""
        if n_rows == self.rows:
            self.found[k].append(seconds / n_rounds)

    def seconds(self) -> list[float]:
        """For 0 to k drafted tokens, with the time between rounds; what was not timed lies on a line."""
        gap = median(self.gaps)
        timed = {k: gap + median(self.found[k]) for k in self.timed}
        seconds = []
        for k in range(self.k + 1):
            below, above = max(t for t in timed if t <= k), min(t for t in timed if t >= k)
            share = (k - below) / (above - below) if above > below else 0.0
            seconds.append(timed[below] + share * (timed[above] - timed[below]))
        return seconds


def _best(rows: int, expected: Sequence[float], seconds: Sequence[float]) -> Forecast:
    """By E t_0 / t_k; seconds of rounds that draft 0, 1, ... tokens."""
    each = [
        Forecast(rows, k, e, s / seconds[0], e * seconds[0] / s)
        for k, (e, s) in enumerate(zip(expected, seconds, strict=True))
    ]
    best = max(each[1:], key=lambda one: one.speedup)
    return best if best.speedup > 1 else replace(best, k=0, speedup=1.0)
