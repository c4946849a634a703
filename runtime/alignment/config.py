"""What a training is told: method, settings, what is watched, and where it writes."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from runtime.alignment.encode import Truncation
from runtime.alignment.groups import GroupSettings
from runtime.alignment.losses import LossSettings
from runtime.alignment.sparsity import SparsitySettings
from runtime.errors import ConfigError
from runtime.models import PromptFormat

ReportTo = Literal["none", "tensorboard", "wandb", "trackio"]


@dataclass(frozen=True, slots=True)
class RewardSettings:
    """margin: how much of a pair's score margin the rewards must be apart. prefixes: cut copies of each pair."""

    margin: float = 0.0
    prefixes: int = 1

    def __post_init__(self) -> None:
        """ConfigError for what cannot work."""
        if not 0 <= self.margin < math.inf:
            raise ConfigError(f"reward_margin = {self.margin} must be 0 or above")
        if self.prefixes < 0:
            raise ConfigError(f"reward_prefixes = {self.prefixes} must be 0 or above")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Low-rank adapters on `targets` (none named: all linear layers); their output is scaled by alpha / rank.

    adapter: the folder of one to go on with; it brings its own rank, alpha and targets.
    """

    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = ()
    adapter: Path | None = None


@dataclass(frozen=True, slots=True)
class Watch:
    """What is looked at while training runs, in optimizer steps; 0 switches a thing off.

    early_stopping: evaluations without a better worst group that end the training; the best weights are kept.
    divergence: a mean loss of ten steps that is so many times the first one ends it too.
    """

    eval_steps: int = 0
    early_stopping: int = 0
    save_steps: int = 0
    divergence: float = 20.0
    report_to: ReportTo = "none"

    def __post_init__(self) -> None:
        """ConfigError for what cannot work together."""
        if self.early_stopping and not self.eval_steps:
            raise ConfigError(f"early_stopping = {self.early_stopping} needs evaluations; set eval_steps")
        if self.early_stopping and (not self.save_steps or self.save_steps % self.eval_steps):
            raise ConfigError(
                f"save_steps = {self.save_steps} is no multiple of eval_steps = {self.eval_steps}, "
                "so early_stopping could not keep the best weights; set both alike"
            )


@dataclass(frozen=True, slots=True)
class OfflineConfig:
    """Training settings; batch_size counts pairs per process, max_length tokens of prompt and answer.

    packing: short samples of a batch share rows of max_length tokens (sft); their losses stay the same.
    """

    loss: LossSettings | RewardSettings = LossSettings()
    groups: GroupSettings = GroupSettings()
    learning_rate: float = 1e-6
    epochs: int = 1
    batch_size: int = 8
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    max_length: int = 1024
    truncation: Truncation = "drop"
    packing: bool = False
    warmup_ratio: float = 0.1
    lora: LoraSettings | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    prompt_format: PromptFormat = "chat"
    watch: Watch = field(default_factory=Watch)
    sparsity: SparsitySettings = SparsitySettings()

    def __post_init__(self) -> None:
        """ConfigError for what cannot work."""
        if self.sparsity.relufy and self.method != "sft":
            raise ConfigError(f"relufy = true: {self.method} compares with the model as it was; use method = sft first")
        if self.sparsity.is_on and self.method == "reward":
            raise ConfigError("sparsity_weight is for policies; leave it out with method = reward")
        if self.sparsity.is_on and self.gradient_checkpointing:
            raise ConfigError("sparsity_weight and relufy do not work with gradient_checkpointing; switch one off")
        if self.packing and self.method != "sft":
            raise ConfigError(f"packing = true: {self.method} compares whole rows; pack with method = sft alone")

    @property
    def method(self) -> str:
        """Its name."""
        return self.loss.method if isinstance(self.loss, LossSettings) else "reward"


@dataclass(frozen=True, slots=True)
class Places:
    """output: the finished model. work: checkpoints; a training finds and continues its own. logs: event files."""

    output: Path
    work: Path
    logs: Path | None = None
