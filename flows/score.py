"""Final scores of candidates. From the command line: `winnow score`."""

from prefect import flow

from storage.lake import DatasetRef, Lake
from tasks import score as steps
from tasks.cache import published
from tasks.settings import ScoreConfig


@flow(name="score", flow_run_name="score-{config.name}", persist_result=False)
def score(config: ScoreConfig, lake: str) -> DatasetRef:
    """Score every finished candidate, one task per shard.

    Args:
        config: the reward and what it runs on
        lake: the lake, a folder or s3://BUCKET/PREFIX
    """
    step = steps.prepare(config, Lake.open(lake))
    found = published(step, lake)
    if found:
        return found
    count = steps.count_shards(step, lake)
    for index in range(count):
        steps.score_shard(step, lake, index, count)
    return steps.publish(step, lake, count)
