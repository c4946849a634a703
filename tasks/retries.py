"""Which failures are worth another attempt."""

from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from tasks.errors import USER_ERRORS


def retry_unless_user_error(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """A mistake in the configuration or the data fails in the same way again; anything else may be passing."""
    data = getattr(state.data, "result", state.data)
    return not isinstance(data, USER_ERRORS)
