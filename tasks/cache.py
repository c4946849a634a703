"""The lake as cache: a stage whose version is published is not run."""

from collections.abc import Mapping

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext

from storage.lake import DatasetRef, Lake
from tasks.errors import ConfigError
from tasks.logs import log_event
from tasks.versions import Step

MOST_STARTS = 5


def published(step: Step, lake_root: str) -> DatasetRef | None:
    """The step's result when the lake has it, else None; either is logged, and the run is named after it."""
    check_starts()
    ref = step.published(Lake.open(lake_root))
    name_run(f"{step.stage} {step.name}@{step.version}")
    log_event("in-the-lake" if ref else "will-be-made", stage=step.stage, version=step.ref_text)
    return ref


def published_chain(name: str, chain: Mapping[str, Step], lake: Lake) -> dict[str, DatasetRef] | None:
    """All results of a pipeline's steps when the lake has every one of them: nothing is left to run."""
    check_starts()
    name_run(f"pipeline {name}@{chain['export'].version}")
    found = {stage: step.published(lake) for stage, step in chain.items()}
    if any(ref is None for ref in found.values()):
        return None
    log_event("in-the-lake", stage="pipeline", version=chain["export"].ref_text)
    return {stage: ref for stage, ref in found.items() if ref is not None}


def check_starts() -> None:
    """ConfigError for a run that has crashed each time it was started: the next time would be no better."""
    context = FlowRunContext.get()
    n_starts = context.flow_run.run_count if context is not None and context.flow_run is not None else 0
    if n_starts > MOST_STARTS:
        raise ConfigError(
            f"this run crashed {MOST_STARTS} times, the worker with it; give the worker more memory or the stage "
            "smaller shards, then start a new run"
        )


def name_run(name: str) -> None:
    """Call the flow run by what it makes, which is known once its inputs are."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow_run.name == name:
        return
    with get_client(sync_client=True) as client:
        client.update_flow_run(context.flow_run.id, name=name)
