"""Tags: runs of stages have one (infra/automations/zombie-runs.yaml), their tasks have none."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.context import TagsContext


@contextmanager
def untagged() -> Iterator[None]:
    """Tasks called here do not inherit the tags of their flow run.

    Prefect asks the server for a concurrency slot per tag before a task starts. On SQLite that took two seconds in
    two of five tasks of a pipeline, a tenth of the demo's time.
    """
    with TagsContext(current_tags=set()):
        yield
