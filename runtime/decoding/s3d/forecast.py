"""What S3D is worth on this machine before anything is drawn: measured rounds, and acceptance measured in training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from runtime.decoding.controller import Acceptance
from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutSchedule
from runtime.decoding.s3d.adapter import S3DAdapter
from runtime.decoding.s3d.rounds import Clock, S3DDecoding, S3DRounds
from runtime.decoding.sampling import SamplingConfig
from runtime.errors import InputError, ModelError
from runtime.models import LoadedModel, PromptFormat
from runtime.records import Prompt

N_TIMED = 4  # full rounds of an answer


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
    """One per number of rows; each takes some twenty rounds. ModelError for an adapter of unknown acceptance."""
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
    sampling = SamplingConfig(n=rows, max_new_tokens=N_TIMED * (s3d.adapter.config.k + 1))
    engine = Engine(policy, sampling, CutSchedule(), None, rows, prompt_format, s3d=s3d)
    [answers] = engine.generate([prompt])
    assert isinstance(engine.steps, S3DRounds) and engine.steps.controller is not None
    controller = engine.steps.controller
    if not controller.seconds:
        raise InputError(f"no round can be timed: {answers[0].error}")
    return controller.times(next(iter(controller.seconds)))


def _best(rows: int, expected: Sequence[float], seconds: Sequence[float]) -> Forecast:
    """By E t_0 / t_k; seconds of rounds that draft 0, 1, ... tokens."""
    each = [
        Forecast(rows, k, e, s / seconds[0], e * seconds[0] / s)
        for k, (e, s) in enumerate(zip(expected, seconds, strict=True))
    ]
    best = max(each[1:], key=lambda one: one.speedup)
    return best if best.speedup > 1 else replace(best, k=0, speedup=1.0)
