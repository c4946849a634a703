"""What the parameters of all stages have in common."""

from pydantic import BaseModel, ConfigDict, Field

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,50}$"
STARTER = "starter"


class StageConfig(BaseModel):
    """What all stages share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("main", title="Name", description="Name of the datasets in the lake", pattern=NAME_PATTERN)
