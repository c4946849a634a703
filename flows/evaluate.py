"""Before and after, on held-out prompts. From the command line: `winnow evaluate`."""

from prefect import flow

from storage.lake import DatasetRef, Lake
from tasks import evaluate as steps
from tasks.cache import published
from tasks.settings import EvaluateConfig
from tasks.tags import untagged


@flow(name="evaluate", flow_run_name="evaluate-{config.name}", persist_result=False)
def evaluate(config: EvaluateConfig, lake: str) -> DatasetRef:
    """Answer the same held-out prompts with both models and compare them per group.

    Args:
        config: the two models, the truth rule and the reward
        lake: the lake, a folder or s3://BUCKET/PREFIX
    """
    step = steps.prepare(config, Lake.open(lake))
    found = published(step, lake)
    if found:
        return found
    with untagged():
        for which in steps.MODELS:
            steps.answer(step, lake, which)
        return steps.compare(step, lake)
