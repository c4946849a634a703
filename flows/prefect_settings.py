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


def need_server() -> str:
    """The address of the server that is configured; ConfigError when there is none."""
    prepare_prefect(verbose=True)
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if not url:
        raise ConfigError(
            "this needs a Prefect server: start one (`make server`), then set PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    return url


def _check_server() -> None:
    import httpx
    from prefect.settings import get_current_settings

    api = get_current_settings().api
    if not api.url:
        return
    user, _, password = api.auth_string.get_secret_value().partition(":") if api.auth_string else ("", "", "")
    try:
        # Not /health, which answers whoever asks.
        url = f"{api.url.rstrip('/')}/admin/version"
        httpx.get(url, timeout=10, auth=(user, password) if api.auth_string else None).raise_for_status()
    except httpx.HTTPStatusError as error:
        if error.response.status_code in (401, 403):
            given = "is refused" if api.auth_string else "is not set"
            raise ConfigError(
                f'PREFECT_API_URL = "{api.url}": PREFECT_API_AUTH_STRING {given}; set USER:PASSWORD'
            ) from error
        raise ConfigError(
            f'PREFECT_API_URL = "{api.url}" answers {error.response.status_code}; check the address'
        ) from error
    except httpx.HTTPError as error:
        raise ConfigError(
            f'PREFECT_API_URL = "{api.url}" does not answer ({type(error).__name__}); start `make server` or unset it'
        ) from error
