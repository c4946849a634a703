"""Pipelines for new prompts under a prefix; its deployment looks every five minutes, once its schedule is on."""

from prefect import flow

from tasks import watch as steps
from tasks.settings_watch import WatchConfig


@flow(name="watch", flow_run_name="watch-{config.name}", persist_result=False)
def watch(config: WatchConfig, lake: str) -> list[str]:
    """Start the pipeline for every file with prompts that is new under a prefix.

    Args:
        config: where prompts arrive, and what is started for them
        lake: the lake, a folder or s3://BUCKET/PREFIX
    """
    return steps.start_new(config, lake)
