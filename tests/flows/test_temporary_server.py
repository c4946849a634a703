"""The Prefect server that a command starts for itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
