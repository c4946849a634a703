"""A completions server of which every answer is known, and that counts how many requests it has at once."""

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.servers.answering import Asked, answering


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

    def answer(asked: Asked) -> tuple[int, object]:
        if asked.method == "GET":
            return 200, {"object": "list", "data": []}
        found.begin()
        time.sleep(seconds)
        text = hashlib.sha256(f"{asked.body['prompt']} {asked.body['seed']}".encode()).hexdigest()[:8]
        found.end()
        choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        usage = {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}
        about = {"id": "x", "object": "text_completion", "created": 0, "model": asked.body["model"]}
        return 200, {**about, "choices": [choice], "usage": usage}

    with answering(answer) as url:
        found.url = f"{url}/v1"
        yield found
