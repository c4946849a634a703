"""What Prefect costs: shard tasks per second with empty work, and the fixed cost of a flow.

    PYTHONPATH=. .venv/bin/python tests/benchmarks/bench_orchestration.py [--shards 200]

Without PREFECT_API_URL a temporary server is started; its start is a row of its own.
"""

from __future__ import annotations

import argparse
import platform
import time

from prefect import flow, task
from prefect.testing.utilities import prefect_test_harness

from tasks.runners import open_runner, submit_all
from tasks.settings_execution import ExecutionConfig


@task(persist_result=False)
def empty(index: int) -> int:
    """A shard without work."""
    return index


@flow(persist_result=False)
def nothing() -> None:
    """A flow without tasks."""


@flow(persist_result=False)
def shards(count: int, workers: int) -> float:
    """Seconds that `count` shards take on the thread runner."""
    started = time.perf_counter()
    with open_runner(ExecutionConfig(workers=workers)) as runner:
        submit_all(runner, empty, ({"index": i} for i in range(count)), 3 * workers)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=200)
    count = parser.parse_args().shards
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    started = time.perf_counter()
    with prefect_test_harness(server_startup_timeout=180):
        print(f"server started and migrated        {time.perf_counter() - started:8.1f} s")
        nothing()
        started = time.perf_counter()
        nothing()
        print(f"an empty flow                      {time.perf_counter() - started:8.2f} s")
        for workers in (1, 2, 8):
            seconds = shards(count, workers)
            print(f"{count} empty shards, {workers} threads     {count / seconds:8.1f} per second")


if __name__ == "__main__":
    main()
