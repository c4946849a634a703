"""Parameters of a run that change none of its results: on how many workers, machines and GPUs it runs."""

from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

from tasks.settings_base import STRICT


class ExecutionConfig(BaseModel):
    """How a run is spread out. No part of any version: the same configuration gives the same dataset everywhere."""

    model_config = STRICT

    task_runner: Literal["thread", "process", "dask", "ray"] = Field(
        "thread",
        title="Task runner",
        description="What runs the shards of generate and score: threads or processes of this machine, Dask or Ray",
    )
    workers: int = Field(1, title="Workers", description="Shards at the same time", ge=1, le=4096)
    address: str = Field(
        "",
        title="Cluster",
        description="Address of a Dask scheduler (tcp://HOST:8786) or a Ray cluster (ray://HOST:10001); empty: one is "
        "started here",
    )
    gpus: list[str] = Field(
        [],
        title="GPUs",
        description="Of each machine, such as 0 and 1. Every worker process gets one for itself "
        "(CUDA_VISIBLE_DEVICES); empty: all workers see all. On a Ray cluster each shard gets one of Ray's choice",
    )

    @property
    def leased_gpus(self) -> list[str]:
        """The GPUs of which a worker process takes one; none where Ray hands them out itself."""
        return [] if self.task_runner == "ray" and self.address else self.gpus

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.address and self.task_runner not in ("dask", "ray"):
            raise ValueError(f'address = "{self.address}" is for dask or ray; task_runner is {self.task_runner}')
        if self.gpus and self.task_runner == "thread" and self.workers > 1:
            raise ValueError(
                f"workers = {self.workers} threads share one process and its GPU; use process, dask or ray"
            )
        if self.gpus and not self.address and len(self.gpus) < self.workers:
            raise ValueError(f"workers = {self.workers}, but gpus names {len(self.gpus)}; give each worker one")
        if len(set(self.gpus)) != len(self.gpus) or not all(self.gpus):
            raise ValueError(f"gpus = {self.gpus} names one twice, or nothing")
        return self


class PipelineExecutionConfig(ExecutionConfig):
    """How a pipeline is run."""

    approve_training: bool = Field(
        False,
        title="Ask before training",
        description="Suspend the pipeline before it fine-tunes, until someone resumes it in the UI",
    )


HERE = ExecutionConfig()  # one shard after the other, in this process
PIPELINE_HERE = PipelineExecutionConfig()
