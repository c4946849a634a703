"""The Prefect server that a command starts for itself."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import prefect_settings
from flows.temporary_server import TemporaryServer
from tasks.errors import ConfigError

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from flows.temporary_server import TemporaryServer
server = TemporaryServer()
server.wait()
print(server.process.pid, flush=True)
sys.stdin.read()
"""


def _is_alive(pid: int) -> bool:
    """An ended process that nobody has waited for has no command line."""
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes() != b""
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_server_ends_with_the_command_that_was_killed(tmp_path: Path) -> None:
    environment = os.environ | {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": ""}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = subprocess.Popen([sys.executable, "-c", HOLD], cwd=ROOT, env=environment, **pipes)  # type: ignore[call-overload]
    assert command.stdout is not None
    server = int(command.stdout.readline())
    assert _is_alive(server)
    command.send_signal(signal.SIGKILL)
    command.communicate()
    deadline = time.monotonic() + 300
    while _is_alive(server) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _is_alive(server)


@pytest.mark.timeout(900)
def test_a_server_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{tmp_path}/file/prefect.db")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    server = TemporaryServer()
    with pytest.raises(ConfigError, match="Prefect's own server did not start") as caught:
        server.wait()
    assert "\n" not in str(caught.value)
    server.stop()


@pytest.mark.parametrize(
    "configured",
    [
        lambda folder, patch: patch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api"),
        lambda folder, patch: patch.setenv("PREFECT_PROFILE", "other"),
        lambda folder, patch: (folder / "home" / "profiles.toml").touch(),
        lambda folder, patch: (folder / ".env").touch(),
        lambda folder, patch: (folder / "prefect.toml").touch(),
        lambda folder, patch: (folder / "pyproject.toml").write_text('[tool.prefect]\nhome = "x"\n'),
    ],
)
def test_no_server_is_started_early_where_one_may_be_configured(
    configured: Callable[[Path, pytest.MonkeyPatch], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_SERVER_EPHEMERAL_ENABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    assert prefect_settings.nothing_is_configured()
    configured(tmp_path, monkeypatch)
    assert not prefect_settings.nothing_is_configured()


def test_a_server_that_is_not_wanted_after_all_is_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    server = TemporaryServer()
    server.kill()
    assert not _is_alive(server.process.pid)
