"""What happened, as text for people and as fields for machines."""

import logging

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from prefect.runtime import task_run

from storage.writer import Shard
from tasks.versions import Step

Logger = logging.Logger | logging.LoggerAdapter[logging.Logger]


def run_logger() -> Logger:
    """The log of the Prefect run, which its page shows; outside a run the module's own."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger("winnow")


def log_event(event: str, **fields: str | int | float | None) -> None:
    """One line `event key=value ...`; Prefect's JSON formatter shows the fields under `winnow`."""
    known = {key: value for key, value in fields.items() if value is not None}
    text = " ".join(f"{key}={value}" for key, value in known.items())
    run_logger().info("%s %s", event, text, extra={"winnow": {"event": event, **known}})


def shard_name() -> str:
    """Of a shard's task run, counted from one as everywhere that people look."""
    parameters = task_run.parameters
    return f"shard {parameters['index'] + 1} of {parameters['count']}"


def log_shard(step: Step, shard: Shard, **counts: int) -> None:
    """A shard is done."""
    place = f"{shard.index + 1}/{shard.count}"
    log_event("shard-done", stage=step.stage, version=step.ref_text, shard=place, **counts)
