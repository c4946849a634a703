"""Final scores of candidates. From the command line: `winnow score`."""

from prefect import flow

from storage.lake import DatasetRef, Lake
from tasks import score as steps
from tasks.cache import published
from tasks.runners import run_shards
from tasks.settings import ScoreConfig
from tasks.settings_execution import HERE, ExecutionConfig
from tasks.tags import untagged


@flow(name="score", flow_run_name="score-{config.name}", persist_result=False)
def score(config: ScoreConfig, lake: str, execution: ExecutionConfig = HERE) -> DatasetRef:
    """Score every finished candidate, one task per shard.

    Args:
        config: the reward and what it runs on
        lake: the lake, a folder or s3://BUCKET/PREFIX
        execution: on how many workers; changes no result
    """
    step = steps.prepare(config, Lake.open(lake))
    found = published(step, lake)
    if found:
        return found
    with untagged():
        count = steps.count_shards(step, lake)
        run_shards(steps.score_shard, step, lake, count, execution)
        return steps.publish(step, lake, count)
