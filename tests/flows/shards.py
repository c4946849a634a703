"""Shards that say where they ran, for tests of the task runners; a module, as worker processes import them."""

import os
import sys
import time
from pathlib import Path

from prefect import task
from prefect.utilities.engine import capture_sigterm

from tasks.leases import use_gpu
from tasks.runners import open_runner
from tasks.settings_execution import ExecutionConfig
from tasks.stops import started


@task(persist_result=False)
def place_of_shard(execution: ExecutionConfig, seconds: float = 0.0) -> tuple[int, str, float, float]:
    """Process, GPU, and when it began and ended."""
    begun = time.time()
    use_gpu(execution.leased_gpus)
    time.sleep(seconds)
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES", ""), begun, time.time()


@task(persist_result=False)
def hold(execution: ExecutionConfig, folder: str) -> None:
    """A shard without end."""
    gpu = use_gpu(execution.leased_gpus)
    Path(folder, f"{os.getpid()}-{gpu}").touch()
    time.sleep(3600)


def main(folder: str) -> None:
    """Two worker processes, each with a shard without end; SIGTERM does here what it does in a flow."""
    execution = ExecutionConfig(task_runner="process", workers=2, gpus=["0", "1"])
    runner = open_runner(execution)
    with capture_sigterm(), started(runner):
        for future in [runner.submit(hold, {"execution": execution, "folder": folder}) for _ in range(2)]:
            future.result()


if __name__ == "__main__":
    main(sys.argv[1])
