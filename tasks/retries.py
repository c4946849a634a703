"""Which failures are worth another attempt, and when."""

from collections.abc import Callable
from typing import Any, TypedDict

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task, exponential_backoff

from storage.errors import LakeUnreachableError
from tasks.errors import UnreachableError

# What a network, a server that restarts or a node that is taken away look like.
PASSING = (LakeUnreachableError, UnreachableError, ConnectionError, TimeoutError)


class Retries(TypedDict):
    """Arguments of a task that is tried again."""

    retries: int
    retry_delay_seconds: Callable[[int], list[float]]
    retry_jitter_factor: float
    retry_condition_fn: Callable[[Task[..., Any], TaskRun, State[Any]], bool]


def is_worth_retrying(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Only what may pass: a mistake of the user's, a full disk or a bug of ours fails in the same way again."""
    data = getattr(state.data, "result", state.data)
    return isinstance(data, PASSING) or _is_transport(data)


def _is_transport(data: object) -> bool:
    import httpx

    return isinstance(data, httpx.TransportError)


# Four attempts over about half a minute: a server of ours is restarted in that time.
RETRIES = Retries(
    retries=3,
    retry_delay_seconds=exponential_backoff(4),
    retry_jitter_factor=0.5,
    retry_condition_fn=is_worth_retrying,
)
