"""Preference data into the lake. From the command line: `winnow import SOURCE`."""

from prefect import flow

from storage.lake import DatasetRef
from tasks import import_preferences as steps
from tasks.cache import published
from tasks.settings import ImportConfig


@flow(name="import", flow_run_name="import-{config.name}", persist_result=False)
def import_preferences(config: ImportConfig, lake: str) -> DatasetRef:
    """Take over pairs that are there already, with the groups whose preferences they are.

    Args:
        config: where the pairs are, how their rows are laid out, and how they are split
        lake: the lake, a folder or s3://BUCKET/PREFIX
    """
    step = steps.prepare(config)
    return published(step, lake) or steps.import_preferences(step, lake)
