"""Starting and ending server processes."""

import http.client
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process, killed at the end of the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for_http(port: int, process: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> None:
    """Until something answers HTTP on the port; the process's log if it does not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/")
            connection.getresponse().read()
            return
        except OSError:
            time.sleep(0.1)
        finally:
            connection.close()
    raise RuntimeError(f"no answer on port {port}: {log.read_text(errors='replace')[-2000:]}")


@contextmanager
def moto(folder: Path, port: int | None = None) -> Iterator[str]:
    """An S3 server in memory; its address."""
    chosen, log = port or free_port(), folder / "moto.log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(chosen)]
    with running(command, log) as process:
        wait_for_http(chosen, process, log)
        yield f"http://127.0.0.1:{chosen}"
