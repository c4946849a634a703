"""What one shard asks of a Prefect server: HTTP requests by route, and messages on its web socket.

    PYTHONPATH=. .venv/bin/python tests/benchmarks/bench_api_calls.py [--shards 200]

A server is started, and a relay in front of it that counts. Shards are empty and say one line, as real ones do; those
of a stage of at most 20 shards have a progress artifact beside that: one request, and one a second.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

from tests.servers.prefect import ROOT, prefect_server

REQUEST = re.compile(rb"^(GET|POST|PUT|PATCH|DELETE) /api(\S*) HTTP/1.1\r$", re.M)
IDS = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}")
FLOW = """
import sys
from prefect import flow, task
from tasks.logs import log_event
from tasks.runners import open_runner, submit_all
from tasks.settings_execution import ExecutionConfig

@task(persist_result=False)
def empty(index: int) -> int:
    log_event("shard-done", shard=index)
    return index

@flow(persist_result=False)
def shards(count: int) -> None:
    with open_runner(ExecutionConfig(workers=2)) as runner:
        submit_all(runner, empty, ({"index": i} for i in range(count)), 6)

shards(int(sys.argv[1]))
"""


class Relay:
    """Passes everything on, and counts what the client sends."""

    def __init__(self, port: int) -> None:
        self.upstream, self.counts = port, Counter[str]()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self.listener.accept()
            server = socket.create_connection(("127.0.0.1", self.upstream))
            threading.Thread(target=self._pass, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, False), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, is_client: bool) -> None:
        frames: bytearray | None = None
        with suppress(OSError):
            while data := source.recv(65536):
                if is_client and frames is not None:
                    frames += data
                    self.counts["message on the web socket"] += _taken(frames)
                elif is_client:
                    for method, path in REQUEST.findall(data):
                        self.counts[f"{method.decode()} {IDS.sub('ID', path.decode())}"] += 1
                    frames = bytearray() if b"upgrade: websocket" in data.lower() else None
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


def _taken(frames: bytearray) -> int:
    """Remove the whole frames at the start (RFC 6455 section 5.2, masked); how many carried text or bytes."""
    n_messages = 0
    while len(frames) >= 2:
        length, size = frames[1] & 127, 2
        if length >= 126:
            size += 2 if length == 126 else 8
            length = int.from_bytes(frames[2:size], "big")
        if len(frames) < size + 4 + length:
            break
        n_messages += frames[0] & 15 in (0, 1, 2)
        del frames[: size + 4 + length]
    return n_messages


def _counted(relay: Relay, home: str, count: int) -> Counter[str]:
    relay.counts = Counter()
    api = {"PREFECT_API_URL": f"http://127.0.0.1:{relay.port}/api", "PREFECT_HOME": home, "PYTHONPATH": str(ROOT)}
    quiet = {"DO_NOT_TRACK": "1", "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(FLOW)
        script.flush()
        subprocess.run([sys.executable, script.name, str(count)], env=os.environ | api | quiet, check=True)
    return relay.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=200)
    count = parser.parse_args().shards
    with tempfile.TemporaryDirectory() as folder, prefect_server(Path(folder)) as server:
        relay = Relay(server.port)
        few, many = _counted(relay, folder, 1), _counted(relay, folder, count)
    print(f"a flow of 1 shard, a flow of {count}, and each further shard:")
    for route in sorted(few | many, key=lambda one: -many[one]):
        print(f"{few[route]:8} {many[route]:8} {(many[route] - few[route]) / (count - 1):8.2f}  {route}")


if __name__ == "__main__":
    main()
