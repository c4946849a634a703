"""A completions server of which every answer is known, and that counts how many requests it has at once."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(slots=True)
class Completions:
    """What came in."""

    url: str = ""
    n_requests: int = 0
    n_now: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> None:
        """A request more."""
        with self.lock:
            self.n_requests += 1
            self.n_now += 1
            self.most_at_once = max(self.most_at_once, self.n_now)

    def end(self) -> None:
        """It is answered."""
        with self.lock:
            self.n_now -= 1


@contextmanager
def completions(seconds: float) -> Iterator[Completions]:
    """One on 127.0.0.1 that takes so long for each answer, which depends on prompt and seed alone."""
    found = Completions()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer({"object": "list", "data": []})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.begin()
            time.sleep(seconds)
            text = hashlib.sha256(f"{asked['prompt']} {asked['seed']}".encode()).hexdigest()[:8]
            found.end()
            choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
            usage = {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}
            about = {"id": "x", "object": "text_completion", "created": 0, "model": asked["model"]}
            self._answer({**about, "choices": [choice], "usage": usage})

        def _answer(self, content: object) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
