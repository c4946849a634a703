"""How the shards of a run that is told to end (cancelled, Ctrl-C) end with it, within seconds.

Processes are terminated. Nothing can stop a thread, so shards in threads ask; what does not ask in time ends with the
whole process. The next run goes on from the shards that are whole.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

from prefect.exceptions import TerminationSignal
from prefect.task_runners import TaskRunner

_PATIENCE_SECONDS = 6.0
_EXIT_CODE = 128 + signal.SIGTERM
_told = threading.Event()


@contextmanager
def started(runner: TaskRunner[Any]) -> Iterator[None]:
    """The runner at work. It ends when its shards have: all of those it has begun, unless this run is told to end."""
    last_resort = threading.Timer(_PATIENCE_SECONDS, os._exit, (_EXIT_CODE,))
    last_resort.daemon = True
    try:
        with runner:
            try:
                yield
            except Exception:
                raise  # beside a shard that fails the others are finished, and kept
            except BaseException:
                _told.set()
                for process in multiprocessing.active_children():
                    process.terminate()
                last_resort.start()
                raise
    finally:
        last_resort.cancel()
        _told.clear()


def stop_if_told() -> None:
    """For shards in threads, now and then: raises what the signal raises in the main thread."""
    if _told.is_set():
        raise TerminationSignal(signal.SIGTERM)


def end_with_parent() -> None:
    """In a worker process: end when the process that started it has, however it did.

    By itself it would wait for work for ever, and keep its GPU from the run that is started instead.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), name="end-with-parent", daemon=True).start()


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(_EXIT_CODE)
