"""What an on-policy training is told beside its method, and what it leaves behind beside its weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from runtime.alignment.config import LoraSettings, ReportTo
from runtime.alignment.online.rollout import Drawing
from runtime.alignment.online.settings import OnlineSettings
from runtime.alignment.report import Point, Warned
from runtime.errors import ConfigError
from runtime.records import Prompt

Truth = Callable[[Prompt, str], float]


@dataclass(frozen=True, slots=True)
class OnlineConfig:
    """prompts_per_step: prompts whose answers make one step. rows: answers per forward pass, which only memory knows.

    kl_limit: mean KL per answer, in nats, above which the training ends. eval_steps, save_steps: 0 switches them off;
    eval_samples: answers per held-out prompt.
    """

    method: OnlineSettings = OnlineSettings()
    drawing: Drawing = Drawing()
    steps: int = 100
    prompts_per_step: int = 16
    rows: int = 64
    learning_rate: float = 1e-6
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0
    kl_limit: float = 100.0
    lora: LoraSettings | None = None
    eval_steps: int = 0
    eval_samples: int = 4
    save_steps: int = 0
    report_to: ReportTo = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        """ConfigError for what cannot work."""
        for name in ("steps", "prompts_per_step", "rows", "eval_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least 1")
        for name in ("learning_rate", "max_grad_norm", "kl_limit"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} = {getattr(self, name)} must be above 0")
        if self.method.method == "jbond" and self.prompts_per_step < 2:
            raise ConfigError("prompts_per_step = 1: jbond's baseline is the mean of the other prompts; use more")
        if self.method.n_samples > self.drawing.max_rows:
            raise ConfigError(
                f"samples = {self.method.n_samples} is above max_rows = {self.drawing.max_rows}; raise max_rows"
            )


@dataclass(frozen=True, slots=True)
class Shown:
    """An answer to a held-out prompt, to look at."""

    step: int
    prompt_id: str
    group: str
    response: str
    reward: float | None
    truth: float | None


@dataclass(frozen=True, slots=True)
class Look:
    """An evaluation as it is told of while the training goes on; alarms: those that it raises."""

    step: int
    shown: Sequence[Shown]
    alarms: Sequence[Warned]


@dataclass(slots=True)
class OnlineReport:
    """What happened. truncated: answers that did not end. unscored: reason -> answers without a reward;
    held_out_unscored: reason -> held-out answers without one or without a truth, over all evaluations."""

    steps: int = 0
    n_answers: int = 0
    n_tokens: int = 0
    truncated: int = 0
    unscored: Mapping[str, int] = field(default_factory=dict)
    held_out_unscored: Mapping[str, int] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    warnings: list[Warned] = field(default_factory=list)
    held_out: dict[str, dict[str, float]] = field(default_factory=dict)

    def curve(self, metric: str, split: str = "train", group: str | None = None) -> list[float]:
        """The values of a metric, step by step."""
        return [p.value for p in self.points if (p.metric, p.split, p.group) == (metric, split, group)]
