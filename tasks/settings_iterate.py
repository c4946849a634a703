"""Parameters of `winnow iterate`: how often the chain is run on its own result."""

from typing import Literal

from pydantic import BaseModel, Field

from tasks.settings_base import STRICT


class IterateConfig(BaseModel):
    """Rounds of generate, score, assemble and finetune; each starts from the last one's model."""

    model_config = STRICT

    rounds: int = Field(3, title="Rounds", description="Each makes candidates, pairs and a model", ge=1, le=99)
    method: Literal["best_of_n", "online_preferences"] = Field(
        "best_of_n",
        title="Method",
        description="best_of_n: imitate the chosen answers (sft); online_preferences: the method of the fine-tuning "
        "stage, such as dpo, on pairs of the policy's own answers",
    )
