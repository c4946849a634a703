"""What counts as the user's mistake: everything below is shown as one line, with exit code 2."""

from runtime.errors import ConfigError, InputError, ModelError, UnreachableError, WinnowError
from storage.errors import StorageError

USER_ERRORS = (WinnowError, StorageError)

__all__ = ["USER_ERRORS", "ConfigError", "InputError", "ModelError", "StorageError", "UnreachableError", "WinnowError"]
