"""Real Prefect servers and workers on 127.0.0.1, each with a folder of its own, ended with all their processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

from tests.servers.processes import free_port, wait_for_http

ROOT = Path(__file__).parents[2]
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}
OPEN = ("SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING", "CRASHED")
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

# Of whatever waits for a server or a run: a machine may have other things to do. Nothing here is about time.
PATIENCE_S = 600


@dataclass(slots=True)
class Server:
    """A Prefect server: its port stays when it is started again."""

    folder: Path
    port: int
    settings: dict[str, str] = field(default_factory=dict)
    auth: tuple[str, str] | None = None
    process: subprocess.Popen[bytes] | None = None
    # One for all requests: to make one takes longer than most answers.
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=60), repr=False)

    @property
    def url(self) -> str:
        """Of its API."""
        return f"http://127.0.0.1:{self.port}/api"

    def environment(self, home: str = "client") -> dict[str, str]:
        """Of whatever talks to it."""
        found = os.environ | QUIET | {"PREFECT_API_URL": self.url, "PREFECT_HOME": str(self.folder / home)}
        return found | ({"PREFECT_API_AUTH_STRING": ":".join(self.auth)} if self.auth else {})

    def start(self) -> None:
        """Until it answers."""
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        own = {"PREFECT_HOME": str(self.folder / "server"), "PREFECT_UI_API_URL": self.url}
        log = self.folder / "server.log"
        self.process = start(command, own_environment() | own | self.settings, log)
        wait_for_http(self.port, self.process, log, PATIENCE_S)

    def stop(self, how: int = signal.SIGKILL) -> None:
        """With all its processes."""
        if self.process is not None:
            stop(self.process, how)
            self.process = None

    def call(self, method: str, path: str, body: object = None) -> Any:
        """An answer of the API; HTTPStatusError for a refusal.

        As Prefect's own client, it asks again when the server is too busy to answer or its database is locked; not when
        the server has ended.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                answer = self.client.request(method, f"{self.url}{path}", json=body, auth=self.auth)
            except httpx.TransportError:
                if time.monotonic() > deadline or self.process is None or self.process.poll() is not None:
                    raise
            else:
                if answer.status_code != 503 or time.monotonic() > deadline:
                    answer.raise_for_status()
                    return answer.json() if answer.content else None
            time.sleep(0.5)

    def deployment(self, name: str) -> dict[str, Any]:
        """By FLOW/NAME."""
        found: dict[str, Any] = self.call("GET", f"/deployments/name/{name}")
        return found

    def run(self, name: str, **parameters: object) -> str:
        """Start a deployment; the id of the run."""
        path = f"/deployments/{self.deployment(name)['id']}/create_flow_run"
        # Asked twice, it is still one run.
        wanted = {"parameters": parameters, "state": {"type": "SCHEDULED"}, "idempotency_key": uuid4().hex}
        return str(self.call("POST", path, wanted)["id"])

    def flow_run(self, run_id: str) -> dict[str, Any]:
        """As it is now."""
        found: dict[str, Any] = self.call("GET", f"/flow_runs/{run_id}")
        return found

    def wait(self, run_id: str, states: Sequence[str] = ENDED, seconds: float = PATIENCE_S) -> dict[str, Any]:
        """The run once it is in one of the states (by type or name); AssertionError when it never is."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = self.flow_run(run_id)
            if found["state"]["type"] in states or found["state"]["name"] in states:
                return found
            time.sleep(0.2)
        raise AssertionError(f"{found['name']} is {found['state']['name']}, not one of {states}")

    def cancel_open_runs(self) -> None:
        """No worker is handed them any more; crashed ones too, which an automation would start again."""
        wanted = {"flow_runs": {"state": {"type": {"any_": OPEN}}}}
        for run in self.call("POST", "/flow_runs/filter", wanted):
            state = {"state": {"type": "CANCELLED", "name": "Cancelled"}, "force": True}
            self.call("POST", f"/flow_runs/{run['id']}/set_state", state)

    def logs(self, run_id: str) -> str:
        """Everything the run and its tasks said."""
        wanted = {"logs": {"flow_run_id": {"any_": [run_id]}}, "limit": 200}
        return "\n".join(entry["message"] for entry in self.call("POST", "/logs/filter", wanted))


@contextmanager
def prefect_server(folder: Path, auth: tuple[str, str] | None = None, **settings: str) -> Iterator[Server]:
    """A server with a database of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    given = dict(settings) | ({"PREFECT_SERVER_API_AUTH_STRING": ":".join(auth)} if auth else {})
    server = Server(folder, free_port(), given, auth)
    try:
        server.start()
        yield server
    finally:
        server.client.close()
        server.stop()


@contextmanager
def deployed_server(folder: Path, lake: Path, **settings: str) -> Iterator[Server]:
    """A server with all deployments, which use this lake."""
    with prefect_server(folder, **settings) as server:
        done = winnow(server, "deploy", "--lake", str(lake))
        assert done.returncode == 0, done.stderr
        yield server


@contextmanager
def worker(server: Server, name: str, pool: str = "winnow", **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process worker that takes one run at a time; ended with whatever it runs."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--limit", "1", "--name", name]
    quick = {"PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    process = start(command, server.environment(name) | quick | variables, server.folder / f"{name}.log")
    try:
        yield process
    finally:
        stop(process)


def is_idle(worker: "subprocess.Popen[bytes]") -> bool:
    """Whether the worker has no run any more."""
    children = Path("/proc", str(worker.pid), "task").glob("*/children")
    return not any(path.read_text() for path in children)


def winnow(server: Server, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command line, against the server."""
    command = [sys.executable, "-m", "flows.cli", *arguments]
    environment = server.environment() | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


def own_environment() -> dict[str, str]:
    """Of what shall know nothing of the Prefect that the tests may run under."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")} | QUIET


def start(
    command: Sequence[str], environment: Mapping[str, str], log: Path, folder: Path = ROOT
) -> subprocess.Popen[bytes]:
    """In a session of its own, so that its children can be ended with it."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )


def stop(process: subprocess.Popen[bytes], how: int = signal.SIGKILL) -> None:
    """End a process and all below it; runs of a worker are sessions of their own."""
    below = descendants(process.pid) if how == signal.SIGKILL else []
    try:
        os.killpg(process.pid, how)
        process.wait(timeout=30)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    finally:
        if how != signal.SIGKILL:
            stop(process)
    for pid in below:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Of a process, as they are now."""
    found: list[int] = []
    for path in Path("/proc", str(pid), "task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *descendants(child)]
    return found


def wait_until(is_so: Callable[[], bool], what: str, seconds: float = 300) -> None:
    """AssertionError, saying what was waited for, when it never comes."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)
