"""Parameters of the flow that starts pipelines for new prompts."""

from pydantic import Field

from tasks.settings_base import StageConfig


class WatchConfig(StageConfig):
    """Where prompts arrive, and what is started for them."""

    prefix: str = Field(
        "incoming", title="Prefix", description="A folder, or s3://BUCKET/PREFIX, in which files with prompts appear"
    )
    pattern: str = Field(
        "*.jsonl",
        title="Pattern",
        description="Names of the files that count, such as *.jsonl or *.parquet",
        min_length=1,
    )
    deployment: str = Field(
        "pipeline/default",
        title="Deployment",
        description="FLOW/NAME of the pipeline that is started for each file; its other parameters stay as deployed",
        pattern=r"^[^/]+/[^/]+$",
    )
    settle_seconds: int = Field(
        60, title="Settle", description="A file that changed less long ago may still be written; it waits", ge=0
    )
