"""Prefect as the command line wants it: quiet, no telemetry, and a clear word when a configured server is away.

Must run before Prefect is imported; never overrides what the user has set.
"""

import os

from tasks.errors import ConfigError

_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
}


def prepare_prefect(verbose: bool) -> None:
    """Set the defaults and check that a configured server answers."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not verbose:
        # Only the console is quiet: the run's own log, as the UI shows it, stays complete.
        for handler in ("CONSOLE", "DEBUG"):
            os.environ.setdefault(f"PREFECT_LOGGING_HANDLERS_{handler}_LEVEL", "CRITICAL")
    _check_server()


def _check_server() -> None:
    import httpx
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if not url:
        return
    try:
        httpx.get(f"{url.rstrip('/')}/health", timeout=10).raise_for_status()
    except httpx.HTTPError as error:
        raise ConfigError(
            f'PREFECT_API_URL = "{url}" does not answer ({type(error).__name__}); start `make server` or unset it'
        ) from error
