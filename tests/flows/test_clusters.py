"""Shards on clusters that were there before, whose machines have more places for processes than GPUs."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import ConfigError
from tasks.runners import gpus_asked_for, open_runner
from tasks.settings_execution import ExecutionConfig
from tasks.stops import started
from tests.servers.prefect import wait_until
from tests.servers.processes import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
N_SHARDS = 6


def _places(execution: ExecutionConfig) -> list[tuple[int, str, float, float]]:
    from tests.flows.shards import place_of_shard

    runner = open_runner(execution)
    with started(runner), gpus_asked_for(execution):
        call = {"execution": execution, "seconds": 1.0}
        futures = [runner.submit(place_of_shard, call) for _ in range(N_SHARDS)]
        return [future.result() for future in futures]


def _check(places: list[tuple[int, str, float, float]]) -> None:
    """Two GPUs, and never two shards at once on one of them."""
    assert len(places) == N_SHARDS
    assert {gpu for _, gpu, *_ in places} == {"0", "1"}
    for gpu in ("0", "1"):
        times = sorted((begun, ended) for _, one, begun, ended in places if one == gpu)
        assert all(first[1] <= second[0] for first, second in zip(times, times[1:], strict=False))


@contextmanager
def _ray_cluster() -> Iterator[str]:
    """One machine with eight places for processes and two GPUs; nobody looks whether they are there."""
    address = f"127.0.0.1:{free_port()}"
    options = [
        "--head",
        "--block",
        "--num-cpus=8",
        "--num-gpus=2",
        "--include-dashboard=false",
        "--disable-usage-stats",
    ]
    # Its sockets are in this folder; their names may not be long.
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        place = [f"--temp-dir={folder}", "--node-ip-address=127.0.0.1", f"--port={address.partition(':')[2]}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, *place]
        with Path(folder, "start.log").open("w") as log:
            process = subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_until(lambda: "Ray runtime started" in Path(folder, "start.log").read_text(), "Ray", 120)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_ray_gives_every_shard_a_gpu_of_its_own(prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prefect_ray", reason="needs prefect_ray: pip install 'winnow[ray]'")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with _ray_cluster() as address:
        _check(_places(ExecutionConfig(task_runner="ray", address=address, workers=2, gpus=["0", "1"])))


@contextmanager
def _dask_cluster(**worker: object) -> Iterator[Any]:
    from distributed import LocalCluster

    options = {"n_workers": 2, "threads_per_worker": 2, "host": "127.0.0.1", "dashboard_address": None}
    with LocalCluster(**options, **worker) as cluster:
        yield cluster


@pytest.mark.long
def test_dask_gives_every_worker_that_counts_a_gpu_one(
    prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("prefect_dask", reason="needs prefect_dask: pip install 'winnow[dask]'")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    execution = ExecutionConfig(task_runner="dask", address="set below", workers=2, gpus=["0", "1"])
    with _dask_cluster(resources={"GPU": 1}) as cluster:
        _check(_places(execution.model_copy(update={"address": cluster.scheduler_address})))
    with _dask_cluster() as cluster, pytest.raises(ConfigError, match="none of its 2 workers has a GPU"):
        open_runner(execution.model_copy(update={"address": cluster.scheduler_address}))
