"""How far partial scores can be trusted. From the command line: `winnow calibrate`."""

from prefect import flow

from storage.lake import DatasetRef, Lake
from tasks import calibrate as steps
from tasks.cache import published
from tasks.settings import CalibrateConfig


@flow(name="calibrate", flow_run_name="calibrate-{config.name}", persist_result=False)
def calibrate(config: CalibrateConfig, lake: str) -> DatasetRef:
    """Best-of-N in full on some prompts, scored along the way; a schedule that saves most and loses least.

    Args:
        config: the decoding to calibrate, and on how many prompts
        lake: the lake, a folder or s3://BUCKET/PREFIX
    """
    step = steps.prepare(config, Lake.open(lake))
    found = published(step, lake)
    if found:
        return found
    steps.answer(step, lake)
    return steps.publish(step, lake)
