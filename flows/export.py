"""A model out of the lake. From the command line: `winnow export`."""

from prefect import flow

from storage.lake import DatasetRef, Lake
from tasks import export as steps
from tasks.cache import published
from tasks.settings import ExportConfig
from tasks.tags import untagged


@flow(name="export", flow_run_name="export-{config.name}", persist_result=False)
def export(config: ExportConfig, lake: str) -> DatasetRef:
    """Write a model as a bundle.

    Args:
        config: which model, in which format
        lake: the lake, a folder or s3://BUCKET/PREFIX
    """
    step = steps.prepare(config, Lake.open(lake))
    with untagged():
        return published(step, lake) or steps.export(step, lake)
