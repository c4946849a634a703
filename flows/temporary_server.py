"""A Prefect server for one command, where none is configured; it ends with the command, however that ends.

Prefect would start one by itself, but later and slower: it imports all of the server into the command first, and the
server looks for blocks, schedules and automations, none of which a single command has.
"""

import atexit
import os
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from typing import IO

from tasks import garbage
from tasks.errors import ConfigError

START_SECONDS = 600  # one that ends is noticed at once; a machine may have other things to do
END_SECONDS = 10
_SETTINGS = {
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
    "PREFECT_API_URL": "",
    "PREFECT_UI_ENABLED": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
    "PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
    "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
}


class TemporaryServer:
    """Started at once, ready later; its port is taken before it starts, so that nobody else can have it."""

    def __init__(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the server)
        command = [sys.executable, "-c", "from flows.temporary_server import serve; serve()", str(listener.fileno())]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | _SETTINGS,
            pass_fds=[listener.fileno()],
        )
        listener.close()
        atexit.register(self.stop)

    def wait(self) -> None:
        """Until it answers; ConfigError when it never does."""
        try:
            # Asked before it is ready, it answers once it is; never through a proxy.
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            direct.open(f"{self.url}/health", timeout=START_SECONDS).close()
        except (urllib.error.URLError, OSError) as error:
            self.log.seek(0)
            said = self.log.read().decode(errors="replace").strip().splitlines()
            raise ConfigError(
                f"Prefect's own server did not start ({said[-1] if said else error}); look at PREFECT_HOME, or start "
                "`make server` and set PREFECT_API_URL"
            ) from error

    def kill(self) -> None:
        """End it before it has anything to write."""
        atexit.unregister(self.stop)
        self.process.kill()
        self._close()

    def stop(self) -> None:
        """End it, its last records written."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._close()

    def _close(self) -> None:
        assert self.process.stdin is not None
        self.process.wait()
        self.process.stdin.close()
        self.log.close()


def serve() -> None:
    """Be the server, until standard input ends: when the command stops it, or is no more."""
    with garbage.large_imports():
        import prefect.server.api.server  # noqa: F401
        import uvicorn

    config = uvicorn.Config("prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on")
    server = uvicorn.Server(config)

    def watch() -> None:
        sys.stdin.buffer.read()
        server.should_exit = True

    threading.Thread(target=watch, daemon=True).start()
    server.run([socket.socket(fileno=int(sys.argv[1]))])
    os._exit(0)  # all is written; Python would take two seconds to forget the server
