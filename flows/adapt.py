"""A policy that drafts for itself. From the command line: `winnow adapt`."""

from prefect import flow

from storage.lake import DatasetRef, Lake
from tasks import adapt as steps
from tasks.cache import published
from tasks.settings import AdaptConfig


@flow(name="adapt", flow_run_name="adapt-{config.name}", persist_result=False)
def adapt(config: AdaptConfig, lake: str) -> DatasetRef:
    """Train an S3D adapter on the policy's own answers, for every choice of kept layers, and publish the best.

    Args:
        config: which policy, on what answers, and how
        lake: the lake, a folder or s3://BUCKET/PREFIX
    """
    step = steps.prepare(config, Lake.open(lake))
    return published(step, lake) or steps.adapt(step, lake)
