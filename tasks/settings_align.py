"""Parameters of `winnow align`: on-policy training. docs/online.md explains the methods and their constants."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.settings_base import REPORT_TO, STARTER, ReportTo
from tasks.settings_drafting import S3D, S3D_ADAPTER, S3DChoice
from tasks.settings_reward import RewardConfig


class AlignConfig(RewardConfig):
    """The policy answers prompts, a reward scores the answers, and the policy learns from them at once."""

    prompts: str = Field("", title="Prompts", description="REF of the prompts; empty: prompts/NAME, latest")
    model: str = Field(STARTER, title="Policy", description="Folder, hub name, models/NAME or starter")
    method: Literal["grpo", "rloo", "ppo", "remax", "jbond", "bond"] = Field(
        "grpo", title="Method", description="grpo: group relative, not to be confused with group-robust weights"
    )
    steps: int = Field(100, title="Steps", description="Each draws answers to some prompts and learns from them", ge=1)
    prompts_per_step: int = Field(16, title="Prompts per step", description="Whose answers are drawn together", ge=1)
    processes: int = Field(
        1,
        title="Processes",
        description="That train together on this machine (torchrun), each with its part of the prompts of every step; "
        "one GPU each",
        ge=1,
        le=64,
    )
    samples: int | None = Field(
        None, title="Answers", description="Per prompt; default 8 for grpo, 4 for rloo and bond, 1 for the others", ge=1
    )
    temperature: float = Field(1.0, title="Temperature", description="At which answers are drawn", gt=0, le=10)
    max_new_tokens: int = Field(128, title="New tokens", description="At most, per answer", ge=1)
    eos_penalty: float = Field(
        0.0, title="End penalty", description="Off the reward of an answer that does not end in time", ge=0
    )
    learning_rate: float = Field(1e-5, title="Learning rate", description="After a linear warm-up", gt=0)
    warmup_ratio: float = Field(0.05, title="Warm-up", description="Share of the steps", ge=0, le=1)
    max_grad_norm: float = Field(1.0, title="Gradient norm", description="Larger gradients are scaled to it", gt=0)
    epochs: int = Field(1, title="Epochs", description="Passes over the answers of a step (grpo, rloo, ppo)", ge=1)
    minibatches: int = Field(1, title="Minibatches", description="Updates per pass (grpo, rloo, ppo)", ge=1)
    kl_coef: float | None = Field(
        None,
        title="KL coefficient",
        description="Pull to the policy it started from; default 0.04 for grpo (in the loss), 0.05 for ppo and rloo, "
        "0.1 for remax (in the reward)",
        ge=0,
    )
    kl_target: float | None = Field(
        None, title="KL target", description="Nats per answer that kl_coef is steered to (ppo, rloo, remax)", gt=0
    )
    kl_limit: float = Field(
        100.0, title="KL limit", description="Nats per answer from where it started, above which training stops", gt=0
    )
    clip_low: float = Field(0.2, title="Clip below", description="How far the ratio may fall (grpo, rloo, ppo)", gt=0)
    clip_high: float = Field(
        0.2, title="Clip above", description="How far the ratio may rise; 0.28 is DAPO's (grpo, rloo, ppo)", gt=0
    )
    scale_rewards: bool = Field(
        True, title="Scale rewards", description="By their deviation per prompt; off is Dr. GRPO (grpo)"
    )
    aggregation: Literal["sequence", "token", "constant"] = Field(
        "sequence",
        title="Aggregation",
        description="sequence: answers weigh alike; token: tokens do (DAPO); constant: per max_new_tokens (Dr. GRPO)",
    )
    skip_equal: bool = Field(
        False, title="Skip equal", description="Leave out prompts whose answers have one reward (grpo)"
    )
    gamma: float = Field(1.0, title="Gamma", description="Discount per token (ppo, remax)", ge=0, le=1)
    lam: float = Field(0.95, title="Lambda", description="Of generalised advantages (ppo)", ge=0, le=1)
    whiten: bool = Field(True, title="Whiten", description="Advantages to mean 0 and variance 1 (ppo)")
    value_coef: float = Field(0.1, title="Value weight", description="Of the value head's loss (ppo)", ge=0)
    value_clip: float = Field(0.2, title="Value clip", description="How far a value may move per step (ppo)", gt=0)
    value_learning_rate: float = Field(
        1e-3, title="Value learning rate", description="Of the value head, which starts from nothing (ppo)", gt=0
    )
    jeffreys: float = Field(
        0.5, title="Jeffreys", description="0: imitate the best answer only; 1: rewards only (jbond, bond)", ge=0, le=1
    )
    anchor_rate: float = Field(
        0.02, title="Anchor rate", description="How fast the anchor follows the policy (jbond)", ge=0, le=1
    )
    anchor_weight: float = Field(0.0, title="Anchor weight", description="Pull to the anchor (jbond)", ge=0)
    bond_n: int = Field(16, title="N", description="The policy becomes best of so many (bond)", ge=2)
    bond_samples: int = Field(16, title="Reference answers", description="Per prompt, for quantiles (bond)", ge=2)
    reducer: Literal["mean", "importance", "robust"] = Field(
        "mean",
        title="Groups",
        description="mean: every answer alike; importance: every group alike; robust: the group with the lowest "
        "rewards first (grpo, remax)",
    )
    step_size: float = Field(0.05, title="Step size", description="Eta of the group weights (robust)", gt=0)
    chi: float = Field(1.0, title="Chi", description="0: every group alike, 1: fully robust", ge=0, le=1)
    cut_policy: Literal["none", "schedule", "calibrated", "adaptive", "memory"] = Field(
        "none", title="Cut policy", description="Must be none: cuts would choose which answers are learnt from"
    )
    max_rows: int = Field(128, title="Rows", description="Answers decoded together", ge=1)
    s3d: S3DChoice = S3D
    s3d_adapter: str = S3D_ADAPTER
    backend: Literal["winnow", "trl"] = Field(
        "winnow", title="Backend", description="trl: TRL's GRPOTrainer with these prompts and rewards (grpo)"
    )
    rows: int = Field(64, title="Training rows", description="Answers per forward pass; memory only", ge=1)
    lora: bool = Field(False, title="LoRA", description="Train low-rank adapters and merge them at the end")
    lora_rank: int = Field(16, title="LoRA rank", description="Width of the adapters", ge=1)
    lora_alpha: int = Field(32, title="LoRA alpha", description="Adapters are scaled by alpha / rank", ge=1)
    eval_steps: int = Field(
        0, title="Evaluation", description="Steps between looks at held-out prompts; 0: never", ge=0
    )
    eval_prompts: int = Field(64, title="Held-out prompts", description="At most so many are answered", ge=1)
    eval_samples: int = Field(4, title="Held-out answers", description="Per held-out prompt", ge=1)
    truth: str = Field(
        "none", title="Truth rule", description="For figures: starter, none, or package.module:name -> 0..1"
    )
    save_steps: int = Field(
        20, title="Checkpoints", description="Steps between them; a killed run goes on from the last; 0: none", ge=0
    )
    report_to: ReportTo = REPORT_TO
    seed: int = Field(0, title="Seed", description="Of prompts, answers and new weights", ge=0, lt=2**31)

    @model_validator(mode="after")
    def _draws_everything(self) -> Self:
        if self.cut_policy != "none":
            raise ValueError(
                f'cut_policy = "{self.cut_policy}" would cut answers by their rewards, and the mean over those that '
                f"are left is no estimate of {self.method}'s gradient; use none, or `winnow iterate`, whose methods "
                "learn from the best answers"
            )
        return self

    @model_validator(mode="after")
    def _has_prompts_for_all(self) -> Self:
        least = self.processes * self.minibatches
        if self.processes > 1 and self.prompts_per_step < least:
            raise ValueError(
                f"processes = {self.processes} cannot share prompts_per_step = {self.prompts_per_step} in minibatches "
                f"= {self.minibatches}; make it at least {least}, or start fewer"
            )
        return self
