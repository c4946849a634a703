"""What the parameters of all stages, and of those that read a source, have in common."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,50}$"
STARTER = "starter"

Dtype = Literal["float32", "bfloat16"]
Device = Literal["cpu", "cuda", "auto"]
PromptFormat = Literal["chat", "text"]
ReportTo = Literal["auto", "none", "tensorboard", "wandb", "trackio"]
REPORT_TO: ReportTo = Field(
    "auto",
    title="Report to",
    description="auto: TensorBoard's event files where that package is installed; the table has all figures anyway",
)


def _in_order(schema: dict[str, Any]) -> None:
    """Prefect's form sorts by `position`; PostgreSQL does not keep the order of a JSON object's keys."""
    for position, field in enumerate(schema.get("properties", {}).values()):
        field["position"] = position


STRICT = ConfigDict(extra="forbid", frozen=True, json_schema_extra=_in_order)


class StageConfig(BaseModel):
    """What all stages share."""

    model_config = STRICT

    name: str = Field("main", title="Name", description="Name of the datasets in the lake", pattern=NAME_PATTERN)


class SourceConfig(StageConfig):
    """Where rows come from."""

    source: str = Field(
        STARTER,
        title="Source",
        description="starter, a file (s3://BUCKET/KEY too), a folder or hub name of a datasets dataset",
        min_length=1,
    )
    format: Literal["auto", "jsonl", "parquet", "csv", "dataset"] = Field(
        "auto", title="Format", description="auto: by the file name's ending"
    )
    dataset_split: str = Field("train", title="Dataset split", description="Split to read from a datasets dataset")
