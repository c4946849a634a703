"""Which on-policy method, with which constants."""

import math
from dataclasses import dataclass, fields
from typing import Literal

from runtime.alignment.groups import GroupSettings
from runtime.alignment.online.surrogates import Aggregation, Clip
from runtime.errors import ConfigError

OnlineMethod = Literal["ppo", "remax", "grpo", "rloo", "jbond", "bond"]
# The constants that a method reads; one that it does not read must stay as it is, or a setting would do nothing.
COMMON = frozenset({"method", "samples", "group_weights"})
READS: dict[OnlineMethod, frozenset[str]] = {
    "ppo": frozenset(
        {"kl_coef", "kl_target", "clip_low", "clip_high", "epochs", "minibatches", "gamma", "lam", "whiten"}
        | {"value_coef", "value_clip", "value_learning_rate"}
    ),
    "remax": frozenset({"kl_coef", "kl_target", "gamma"}),
    "grpo": frozenset(
        {"kl_coef", "clip_low", "clip_high", "epochs", "minibatches", "scale_rewards", "aggregation", "skip_equal"}
    ),
    "rloo": frozenset({"kl_coef", "kl_target", "clip_low", "clip_high", "epochs", "minibatches"}),
    "jbond": frozenset({"jeffreys", "anchor_rate", "anchor_weight"}),
    "bond": frozenset({"jeffreys", "bond_n", "bond_samples"}),
}
PAPER_KL: dict[OnlineMethod, float] = {"ppo": 0.05, "remax": 0.1, "grpo": 0.04, "rloo": 0.05}
PAPER_SAMPLES: dict[OnlineMethod, int] = {"grpo": 8, "rloo": 4, "bond": 4}
ROBUST = ("grpo", "remax")
MANY = ("grpo", "rloo", "bond")  # compare the answers to one prompt


@dataclass(frozen=True, slots=True)
class OnlineSettings:
    """A method and its constants; see docs/online.md. ConfigError for those that cannot work.

    samples: answers per prompt. kl_coef: of the pull to the reference, per token in the reward (ppo, remax, rloo) or
    as k3 in the loss (grpo); kl_target: the KL per answer that kl_coef is steered to. epochs, minibatches: passes over
    an answer, and updates per pass. group_weights: group-robust weights, moved by the groups' regret.
    """

    method: OnlineMethod = "grpo"
    samples: int | None = None
    kl_coef: float | None = None
    kl_target: float | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    epochs: int = 1
    minibatches: int = 1
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    value_coef: float = 0.1
    value_clip: float = 0.2
    value_learning_rate: float = 1e-3
    scale_rewards: bool = True
    aggregation: Aggregation = "sequence"
    skip_equal: bool = False
    jeffreys: float = 0.5
    anchor_rate: float = 0.02
    anchor_weight: float = 0.0
    bond_n: int = 16
    bond_samples: int = 16
    group_weights: GroupSettings = GroupSettings()

    def __post_init__(self) -> None:
        """Refuse what cannot work, then fill in what was left out."""
        if self.method not in READS:
            raise ConfigError(f'method = "{self.method}"; choose one of {", ".join(READS)}')
        self._check_unread()
        if self.samples is None:
            object.__setattr__(self, "samples", PAPER_SAMPLES.get(self.method, 1))
        if self.kl_coef is None:
            object.__setattr__(self, "kl_coef", PAPER_KL.get(self.method, 0.0))
        self._check_numbers()

    @property
    def n_samples(self) -> int:
        """`samples`, filled in."""
        assert self.samples is not None
        return self.samples

    @property
    def kl_weight(self) -> float:
        """`kl_coef`, filled in."""
        assert self.kl_coef is not None
        return self.kl_coef

    @property
    def clip(self) -> Clip:
        """Both sides."""
        return Clip(self.clip_low, self.clip_high)

    def _check_unread(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in COMMON | READS[self.method] and value is not None and value != field.default:
                raise ConfigError(f"{field.name} = {value} does nothing in {self.method}; leave it out")
        if self.group_weights.reducer != "mean" and self.method not in ROBUST:
            raise ConfigError(f"group weights work with {' and '.join(ROBUST)}, not with {self.method}; leave them out")

    def _check_numbers(self) -> None:
        least = 2 if self.method in MANY else 1
        if self.n_samples < least:
            raise ConfigError(
                f"samples = {self.n_samples}: {self.method} compares the answers to one prompt; use at least {least}"
            )
        if self.method == "jbond" and self.n_samples != 1:
            raise ConfigError(f"samples = {self.n_samples}: jbond draws one answer per prompt; leave it out")
        for name in ("epochs", "minibatches", "bond_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.bond_n < 2:
            raise ConfigError(f"bond_n = {self.bond_n}: best of fewer than 2 is the reference itself")
        if self.method == "bond" and self.bond_samples < self.bond_n:
            raise ConfigError(f"bond_samples = {self.bond_samples} must hold bond_n = {self.bond_n} answers; raise it")
        for name in ("clip_low", "clip_high", "value_clip", "value_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} = {getattr(self, name)} must be above 0")
        for name in ("kl_coef", "value_coef", "anchor_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} = {getattr(self, name)} must be 0 or above")
        for name in ("gamma", "lam", "jeffreys", "anchor_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be between 0 and 1")
        if self.kl_target is not None and not (0 < self.kl_target < math.inf and self.kl_weight > 0):
            raise ConfigError(f"kl_target = {self.kl_target} steers kl_coef = {self.kl_coef}; both must be above 0")
