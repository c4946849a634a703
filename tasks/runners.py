"""The shards of a stage on threads, processes, Dask or Ray; a few at a time, and the first failure ends it."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, cast

from prefect import Task
from prefect.futures import PrefectFuture
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from storage.lake import Lake
from storage.writer import Shard
from tasks.artifacts import progress
from tasks.errors import ConfigError
from tasks.settings_execution import HERE, ExecutionConfig
from tasks.stops import end_with_parent, started
from tasks.versions import Step

if TYPE_CHECKING:
    ShardTask = Task[[Step, str, int, int, ExecutionConfig], int]

# Submitted shards per worker: enough that none waits, few enough that a failure is not followed by a thousand others.
AHEAD = 3


def run_shards(task: "ShardTask", step: Step, lake_root: str, count: int, execution: ExecutionConfig = HERE) -> None:
    """Run the task for every shard of `candidates` that the lake does not have; one task run each.

    The task returns how many tokens it had to do with. Progress is of these shards: how long the others took is not
    known here.
    """
    todo = missing_shards(step, lake_root, count)
    shown = progress(f"{step.name} shards of {step.stage}", "shards")

    def on_done(n_done: int, n_tokens: int) -> None:
        shown.count(n_tokens)
        shown(n_done, len(todo))

    if execution.task_runner == "thread" and execution.workers == 1:
        for number, index in enumerate(todo, start=1):
            on_done(number, task(step, lake_root, index, count, execution))
        return
    calls = ({"step": step, "lake_root": lake_root, "index": i, "count": count, "execution": execution} for i in todo)
    runner = open_runner(execution)
    with started(runner), gpus_asked_for(execution):
        submit_all(runner, task, calls, AHEAD * execution.workers, on_done)


def missing_shards(step: Step, lake_root: str, count: int) -> list[int]:
    """Indices of the shards that are still to be made. Whether the others are whole is looked at when they are read."""
    lake = Lake.open(lake_root)
    prefix = step.writer(lake).ref.prefix
    present = set(lake.store.list(prefix))
    return [i for i in range(count) if f"{prefix}/{Shard('candidates', 'train', i, count).path}" not in present]


def submit_all(
    runner: TaskRunner[Any],
    task: "Task[..., Any]",
    calls: Iterable[dict[str, Any]],
    at_once: int,
    on_done: Callable[[int, Any], None] = lambda n_done, result: None,
) -> None:
    """Have at most so many submitted, the next one as soon as any is done; raise what the first failing one raised.

    on_done: called with the number of calls that are done and what the last one returned.
    """
    n_done = 0
    done: SimpleQueue[PrefectFuture[Any]] = SimpleQueue()
    running: set[PrefectFuture[Any]] = set()

    def wait_for_one() -> None:
        future = done.get()
        running.remove(future)
        result = future.result()
        nonlocal n_done
        n_done += 1
        on_done(n_done, result)

    for parameters in calls:
        if len(running) >= at_once:
            wait_for_one()
        future = runner.submit(task, parameters)
        running.add(future)
        future.add_done_callback(done.put)
    while running:
        wait_for_one()


@contextmanager
def gpus_asked_for(execution: ExecutionConfig) -> Iterator[None]:
    """Around submissions: a cluster that was there before has each shard wait for a GPU, not a process for each shard.

    Machines of a cluster have more places for processes than GPUs, and those that get none would keep their shards.
    Ray counts GPUs itself and says which one it gives; Dask counts what its workers are started with.
    """
    if execution.task_runner == "ray" and execution.address and execution.gpus:
        from prefect_ray.context import remote_options

        with remote_options(num_gpus=1):
            yield
    elif execution.task_runner == "dask" and execution.address and execution.gpus:
        import dask

        with dask.annotate(resources={"GPU": 1}):
            yield
    else:
        yield


def open_runner(execution: ExecutionConfig) -> TaskRunner[Any]:
    """The configured runner, not started yet; ConfigError when its package is not installed."""
    if execution.task_runner == "thread":
        return ThreadPoolTaskRunner(max_workers=execution.workers)
    if execution.task_runner == "process":
        return ProcessPoolTaskRunner(max_workers=execution.workers, initializer=end_with_parent)
    return _dask(execution) if execution.task_runner == "dask" else _ray(execution)


def _dask(execution: ExecutionConfig) -> TaskRunner[Any]:
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError as error:
        raise ConfigError("task_runner = dask needs the extra dask: pip install 'winnow[dask]'") from error
    if execution.address:
        if execution.gpus:
            _check_gpu_workers(execution.address)
        return cast(TaskRunner[Any], DaskTaskRunner(address=execution.address))
    here = {"n_workers": execution.workers, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
    return cast(TaskRunner[Any], DaskTaskRunner(cluster_kwargs=here))


def _check_gpu_workers(address: str) -> None:
    """ConfigError when no worker of the cluster counts a GPU: the shards would wait for one for ever."""
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
    if workers and not any(worker["resources"].get("GPU") for worker in workers):
        raise ConfigError(
            f'address = "{address}": none of its {len(workers)} workers has a GPU; start one for each GPU with '
            f"dask worker {address} --nthreads 1 --resources GPU=1, or leave gpus empty"
        )


def _ray(execution: ExecutionConfig) -> TaskRunner[Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        from prefect_ray import RayTaskRunner
    except ImportError as error:
        raise ConfigError("task_runner = ray needs the extra ray: pip install 'winnow[ray]'") from error
    if execution.address:
        return cast(TaskRunner[Any], RayTaskRunner(address=execution.address))
    # Ray's workers start from a clean path: they must find what this process found.
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RAY_USAGE_STATS_ENABLED": "0"}
    here = {"num_cpus": execution.workers, "include_dashboard": False, "runtime_env": {"env_vars": variables}}
    return cast(TaskRunner[Any], RayTaskRunner(init_kwargs=here))
