"""Prefect as the command line wants it: quiet, no telemetry, and a clear word when a configured server is away.

Must run before Prefect is imported; never overrides what the user has set.
"""

import importlib
import os
import tomllib
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from tasks import garbage
from tasks.errors import ConfigError

if TYPE_CHECKING:
    from flows.temporary_server import TemporaryServer

_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
}
_CONFIGURING = ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH", "PREFECT_SERVER_EPHEMERAL_ENABLED")
_settings = ExitStack()  # for as long as the command runs


def prepare_prefect(verbose: bool, flow: str) -> None:
    """Set the defaults; check that a configured server answers, or start one where none is; import the flow."""
    _set_defaults(verbose)
    # Before the imports, which take as long as half of its start: Prefect's settings have the last word.
    server = _start_server() if nothing_is_configured() else None
    with garbage.large_imports():
        from prefect.settings import get_current_settings

        settings = get_current_settings()
        if not settings.api.url and settings.server.ephemeral.enabled:
            server = server or _start_server()
        elif server is not None:
            server.kill()
            server = None
        importlib.import_module(f"flows.{flow}")
    if server is not None:
        _use_server(server)
    elif settings.api.url:
        _check_server()


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


def nothing_is_configured() -> bool:
    """Whether no place that Prefect reads settings from can name a server."""
    if any(os.environ.get(name) for name in _CONFIGURING):
        return False
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    if any(file.exists() for file in (home / "profiles.toml", Path("prefect.toml"), Path(".env"))):
        return False
    try:
        return "prefect" not in tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8")).get("tool", {})
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False


def _start_server() -> "TemporaryServer":
    from flows.temporary_server import TemporaryServer

    return TemporaryServer()


def _use_server(server: "TemporaryServer") -> None:
    os.environ["PREFECT_API_URL"] = server.url
    from prefect.context import refresh_global_settings_context
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    refresh_global_settings_context()
    # Nobody looks for runs that are gone on a server that goes with them, and each flow's end waits for its next beat.
    _settings.enter_context(temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}))
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
