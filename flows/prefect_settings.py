"""Prefect as the command line wants it: quiet, no telemetry, and a clear word when a configured server is away.

Must run before Prefect is imported; never overrides what the user has set.
"""

import os

from tasks.errors import ConfigError

_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
}


def prepare_prefect(verbose: bool) -> None:
    """Set the defaults; check that a configured server answers, or start one where none is."""
    _set_defaults(verbose)
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    if settings.api.url:
        _check_server()
    elif settings.server.ephemeral.enabled:
        _start_server()


def need_server() -> str:
    """The address of the server that is configured; ConfigError when there is none."""
    _set_defaults(verbose=True)
    from prefect.settings import get_current_settings

    url = get_current_settings().api.url
    if not url:
        raise ConfigError(
            "this needs a Prefect server: start one (`make server`), then set PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    _check_server()
    return url


def _set_defaults(verbose: bool) -> None:
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not verbose:
        # Only the console is quiet: the run's own log, as the UI shows it, stays complete.
        for handler in ("CONSOLE", "DEBUG"):
            os.environ.setdefault(f"PREFECT_LOGGING_HANDLERS_{handler}_LEVEL", "CRITICAL")


def _start_server() -> None:
    """A server of this command's own; while it starts, what every run needs is imported."""
    from flows.temporary_server import TemporaryServer

    server = TemporaryServer()
    os.environ["PREFECT_API_URL"] = server.url
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()
    import flows.pipeline  # noqa: F401

    server.wait()


def _check_server() -> None:
    import httpx
    from prefect.settings import get_current_settings

    api = get_current_settings().api
    assert api.url is not None
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
