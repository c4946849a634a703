"""Prompts into the lake. From the command line: `winnow ingest SOURCE`."""

from prefect import flow

from storage.lake import DatasetRef
from tasks import ingest as steps
from tasks.cache import published
from tasks.settings import IngestConfig
from tasks.tags import untagged


@flow(name="ingest", flow_run_name="ingest-{config.name}", persist_result=False)
def ingest(config: IngestConfig, lake: str) -> DatasetRef:
    """Read, normalise, group, de-duplicate and split prompts.

    Args:
        config: where prompts come from and which group each belongs to
        lake: the lake, a folder or s3://BUCKET/PREFIX
    """
    step = steps.prepare(config)
    with untagged():
        return published(step, lake) or steps.ingest(step, lake)
