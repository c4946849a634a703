"""Preference pairs from scored candidates. From the command line: `winnow assemble`."""

from prefect import flow

from storage.lake import DatasetRef, Lake
from tasks import assemble as steps
from tasks.cache import published
from tasks.settings import AssembleConfig
from tasks.tags import untagged


@flow(name="assemble", flow_run_name="assemble-{config.name}", persist_result=False)
def assemble(config: AssembleConfig, lake: str) -> DatasetRef:
    """Pair the best answer of each prompt with another one, within margins and quotas.

    Args:
        config: strategy, margin and quota
        lake: the lake, a folder or s3://BUCKET/PREFIX
    """
    step = steps.prepare(config, Lake.open(lake))
    with untagged():
        return published(step, lake) or steps.assemble(step, lake)
