"""Training on preference pairs. From the command line: `winnow finetune`."""

from prefect import flow

from storage.lake import DatasetRef, Lake
from tasks import finetune as steps
from tasks.cache import published
from tasks.settings import FinetuneConfig
from tasks.tags import untagged


@flow(name="finetune", flow_run_name="finetune-{config.name}", persist_result=False)
def finetune(config: FinetuneConfig, lake: str) -> DatasetRef:
    """Train the policy on the pairs and publish the model.

    Args:
        config: method and training settings
        lake: the lake, a folder or s3://BUCKET/PREFIX
    """
    step = steps.prepare(config, Lake.open(lake))
    with untagged():
        return published(step, lake) or steps.finetune(step, lake)
