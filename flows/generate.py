"""Candidates for prompts: Best-of-N, with cuts or without. From the command line: `winnow generate`."""

from prefect import flow

from storage.lake import DatasetRef, Lake
from tasks import generate as steps
from tasks.cache import published
from tasks.runners import run_shards
from tasks.settings import GenerateConfig
from tasks.settings_execution import HERE, ExecutionConfig
from tasks.tags import untagged


@flow(name="generate", flow_run_name="generate-{config.name}", persist_result=False)
def generate(config: GenerateConfig, lake: str, execution: ExecutionConfig = HERE) -> DatasetRef:
    """Draw N candidates per prompt, one task per shard.

    Args:
        config: the policy, its sampling and the cuts
        lake: the lake, a folder or s3://BUCKET/PREFIX
        execution: on how many workers; changes no result
    """
    step = steps.prepare(config, Lake.open(lake))
    found = published(step, lake)
    if found:
        return found
    with untagged():
        count = steps.count_shards(step, lake)
        run_shards(steps.generate_shard, step, lake, count, execution)
        return steps.publish(step, lake, count)
