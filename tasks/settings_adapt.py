"""Parameters of `winnow adapt`: which policy learns to draft for itself, on what text, and how."""

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.settings_base import STARTER, StageConfig

KEPT_PATTERN = re.compile(r"(\d{1,3})\+(\d{1,3})")


class AdaptConfig(StageConfig):
    """S3D: masks behind the last token foresee the next ones in one pass through a few layers."""

    model: str = Field(STARTER, title="Policy", description="Folder, hub name, models/NAME or starter")
    candidates: str = Field(
        "", title="Candidates", description="REF of the policy's own answers; empty: answers are drawn to the prompts"
    )
    prompts: str = Field(
        "", title="Prompts", description="REF, answered where no candidates are given; empty: prompts/NAME, latest"
    )
    max_prompts: int = Field(800, title="Prompts used", description="At most so many, with all their answers", ge=2)
    samples: int = Field(4, title="Answers", description="Per prompt, where they are drawn", ge=1, le=4096)
    max_new_tokens: int = Field(128, title="New tokens", description="At most, where answers are drawn", ge=2)
    temperature: float = Field(
        1.0, title="Temperature", description="Where answers are drawn; given candidates know theirs", gt=0, le=10
    )
    kept: list[str] = Field(
        ["1+1", "2+1", "2+2"],
        title="Kept layers",
        description="FIRST+LAST layers that a draft runs through; every choice is trained and measured, the one with "
        "the highest predicted speed-up, tokens per round / (1 + share of weights in a draft), is published",
        min_length=1,
    )
    k: int = Field(4, title="Masks", description="Tokens drafted in one pass, at most", ge=1, le=16)
    kind: Literal["lora", "embeddings", "skip"] = Field(
        "lora",
        title="Kind",
        description="lora: mask embeddings and low-rank weights; embeddings: those alone; skip: no training",
    )
    rank: int = Field(16, title="Rank", description="Of the low-rank weights", ge=1)
    alpha: float = Field(16.0, title="Alpha", description="Low-rank terms are scaled by alpha / rank", gt=0, le=65536)
    sampler_width: int = Field(
        0,
        title="Sampler width",
        description="Of a head that tells each mask the draft before it, which must then be drawn in turn; 0: none",
        ge=0,
        le=4096,
    )
    loss: Literal["acceptance", "overlap", "kl"] = Field(
        "acceptance",
        title="Loss",
        description="acceptance: -log sum min(p, q); overlap: -sum min(p, q); kl: KL(p, q)",
    )
    steps: int = Field(1000, title="Steps", description="Of training, for every choice of layers", ge=1)
    batch_size: int = Field(8, title="Batch size", description="Answers per step", ge=1)
    groups: int = Field(16, title="Groups", description="Of masks, per answer and step", ge=1)
    learning_rate: float = Field(3e-3, title="Learning rate", description="Of the low-rank weights", gt=0)
    mask_learning_rate: float = Field(3e-2, title="Mask learning rate", description="Of the mask embeddings", gt=0)
    prompt_format: Literal["chat", "text"] = Field(
        "chat", title="Prompt format", description="chat: the tokenizer's chat template; text: one message, as it is"
    )
    seed: int = Field(0, title="Seed", description="Of answers and training", ge=0, lt=2**31)
    device: Literal["cpu", "cuda", "auto"] = Field(
        "cpu", title="Device", description="auto takes a GPU where there is one"
    )
    threads: int = Field(2, title="Threads", description="Threads torch may use on the CPU", ge=1, le=256)

    @model_validator(mode="after")
    def _kept_is_readable(self) -> Self:
        for choice in self.kept:
            if not KEPT_PATTERN.fullmatch(choice):
                raise ValueError(f'kept has "{choice}": write FIRST+LAST, such as 1+1')
        if self.kind == "skip" and self.sampler_width:
            raise ValueError(f'kind = "skip" trains nothing; sampler_width = {self.sampler_width} must be 0')
        return self

    def choices(self) -> list[tuple[int, int]]:
        """`kept` as numbers."""
        matches = [KEPT_PATTERN.fullmatch(choice) for choice in self.kept]
        return [(int(match[1]), int(match[2])) for match in matches if match]
