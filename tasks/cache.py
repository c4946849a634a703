"""The lake as cache: a stage whose version is published is not run."""

import logging

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from storage.lake import DatasetRef, Lake
from tasks.versions import Step


def published(step: Step, lake_root: str) -> DatasetRef | None:
    """The step's result when the lake has it, else None; either is logged."""
    ref = step.published(Lake.open(lake_root))
    _logger().info("%s: %s %s", step.stage, step.ref_text, "is in the lake" if ref else "will be made")
    return ref


def _logger() -> "logging.Logger | logging.LoggerAdapter[logging.Logger]":
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger(__name__)
