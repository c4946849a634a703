"""On-policy training. From the command line: `winnow align`."""

from prefect import flow

from storage.lake import DatasetRef, Lake
from tasks import align as steps
from tasks.cache import published
from tasks.settings import AlignConfig


@flow(name="align", flow_run_name="align-{config.method}-{config.name}", persist_result=False)
def align(config: AlignConfig, lake: str) -> DatasetRef:
    """Let the policy answer prompts, score the answers, learn from them at once, and publish the model.

    Args:
        config: method, reward and training settings
        lake: the lake, a folder or s3://BUCKET/PREFIX
    """
    step = steps.prepare(config, Lake.open(lake))
    return published(step, lake) or steps.align(step, lake)
