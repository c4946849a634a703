"""Which reward scores answers: parameters that several stages share."""

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.settings_base import STARTER, Device, Dtype, PromptFormat, StageConfig

RewardKind = Literal["classifier", "likelihood", "likelihood_sum", "function"]

TERM_PATTERN = re.compile(
    r"(?P<weight>-?\d+(\.\d+)?)\*(?P<kind>classifier|likelihood|likelihood_sum|function):(?P<target>\S+)"
)


class RewardConfig(StageConfig):
    """Which reward scores answers, and on what the models run."""

    reward: RewardKind = Field(
        "classifier",
        title="Reward",
        description="classifier: a one-label sequence classifier; likelihood: mean log-probability per token under a "
        "causal model; likelihood_sum: their sum; function: a Python function of (prompt, response)",
    )
    reward_model: str = Field(
        STARTER, title="Reward model", description="Folder, hub name, models/NAME or starter (classifier, likelihood)"
    )
    reward_function: str = Field(
        "",
        title="Reward function",
        description="package.module:name of the function (reward = function), one that WINNOW_FUNCTIONS allows",
    )
    reward_terms: list[str] = Field(
        [],
        title="Further rewards",
        description="Added to the reward: WEIGHT*KIND:MODEL or WEIGHT*function:package.module:name, such as "
        "0.5*likelihood:starter",
    )
    prompt_format: PromptFormat = Field(
        "chat", title="Prompt format", description="chat: the tokenizer's chat template; text: one message, as it is"
    )
    dtype: Dtype = Field("float32", title="Number format", description="In which the models compute")
    device: Device = Field("cpu", title="Device", description="auto takes a GPU where there is one")
    threads: int = Field(2, title="Threads", description="Threads torch may use on the CPU", ge=1, le=256)

    @model_validator(mode="after")
    def _function_is_named(self) -> Self:
        if self.reward == "function" and ":" not in self.reward_function:
            raise ValueError(f'reward_function = "{self.reward_function}": write package.module:name')
        if self.reward != "function" and self.reward_function:
            raise ValueError(f'reward_function = "{self.reward_function}" needs reward = "function"')
        for term in self.reward_terms:
            if not TERM_PATTERN.fullmatch(term):
                raise ValueError(f'reward_terms has "{term}": write WEIGHT*KIND:MODEL, such as 0.5*likelihood:starter')
        return self

    def terms(self) -> "list[tuple[float, RewardConfig]]":
        """The weights and settings of `reward_terms`, each a reward of its own."""
        shared = {"prompt_format": self.prompt_format, "dtype": self.dtype, "device": self.device}
        found = []
        for term in self.reward_terms:
            match = TERM_PATTERN.fullmatch(term)
            assert match is not None
            target = {"reward_function" if match["kind"] == "function" else "reward_model": match["target"]}
            settings = {"reward": match["kind"], **target, **shared}
            found.append((float(match["weight"]), RewardConfig.model_validate(settings)))
        return found
