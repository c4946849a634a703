"""Things of this machine that one worker has at a time: a GPU, or a place at a server.

A lease is a locked file: the kernel ends it with its process, however that ends.
"""

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tasks.logs import run_logger

_POLL_SECONDS = 0.5
_mine = ExitStack()  # leases that end with the process
_gpu: list[str] = []


def use_gpu(gpus: Sequence[str]) -> str | None:
    """Take one of the GPUs for the rest of this process, and let CUDA see no other; must come before CUDA is used."""
    if gpus and not _gpu:
        _gpu.append(_mine.enter_context(leased("gpu", gpus)))
        os.environ["CUDA_VISIBLE_DEVICES"] = _gpu[0]
    return _gpu[0] if _gpu else None


@contextmanager
def leased(kind: str, names: Sequence[str]) -> Iterator[str]:
    """The first of the names that nobody on this machine has; waits for one."""
    folder = Path(tempfile.gettempdir(), f"winnow-{os.getuid()}-{kind}")
    folder.mkdir(mode=0o700, exist_ok=True)
    with ExitStack() as stack:
        yield _take(stack, folder, names, kind)


def _take(stack: ExitStack, folder: Path, names: Sequence[str], kind: str) -> str:
    is_told = False
    while True:
        for name in names:
            file = (folder / hashlib.sha256(name.encode()).hexdigest()[:16]).open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            stack.enter_context(file)
            return name
        if not is_told:
            run_logger().info("waiting for one of %d: all of kind %s are in use on this machine", len(names), kind)
            is_told = True
        time.sleep(_POLL_SECONDS)
