"""Methods of fine-tuning compared. From the command line: `winnow compare CONFIG`."""

from prefect import flow, tags

from flows.evaluate import evaluate
from flows.finetune import finetune
from storage.lake import DatasetRef, Lake
from tasks import compare as steps
from tasks.cache import published
from tasks.settings import CompareConfig


@flow(name="compare", flow_run_name="compare-{config.name}", persist_result=False)
def compare(config: CompareConfig, lake: str) -> DatasetRef:
    """Train every method with every seed on the same pairs and compare them per group and by the worst one.

    Args:
        config: the methods, the seeds, and what the methods share
        lake: the lake, a folder or s3://BUCKET/PREFIX
    """
    comparison = steps.prepare(config, Lake.open(lake))
    found = published(comparison.step, lake)
    if found:
        return found
    for run in comparison.runs:
        with steps.named(run), tags("winnow-stage"):
            finetune(run.finetune, lake)
            if run.evaluate:
                evaluate(run.evaluate, lake)
    return steps.publish(comparison, lake)
