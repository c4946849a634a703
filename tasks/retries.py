"""Which failures are worth another attempt."""

from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from storage.errors import LakeUnreachableError
from tasks.errors import USER_ERRORS


def retry_unless_user_error(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """A mistake in the configuration or the data fails in the same way again; other failures may pass."""
    data = getattr(state.data, "result", state.data)
    return isinstance(data, LakeUnreachableError) or not isinstance(data, USER_ERRORS)
