"""What Prefect costs: shard tasks per second with empty work, the fixed cost of a flow, and its part of a pipeline.

    PYTHONPATH=. .venv/bin/python tests/benchmarks/bench_orchestration.py [--shards 200]
    PYTHONPATH=. .venv/bin/python tests/benchmarks/bench_orchestration.py --pipeline [--prompts 400]

A temporary server is started; its start is a row of its own. With --pipeline also a worker, and the pipeline is
deployed as prefect.yaml has it: what is in no task, by the times that the server has, is orchestration.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.testing.utilities import prefect_test_harness

from tasks.runners import open_runner, submit_all
from tasks.settings_execution import ExecutionConfig
from tests.servers.prefect import Server, prefect_server, winnow, worker


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


def _seconds(run: Mapping[str, Any]) -> float:
    return (datetime.fromisoformat(run["end_time"]) - datetime.fromisoformat(run["start_time"])).total_seconds()


def pipeline(n_prompts: int) -> None:
    """Deploy, run, and tell where the time went."""
    with tempfile.TemporaryDirectory() as folder, prefect_server(Path(folder, "prefect")) as server:
        deployed = winnow(server, "deploy", "--lake", str(Path(folder, "lake")))
        assert deployed.returncode == 0, deployed.stderr
        config = server.deployment("pipeline/default")["parameters"]["config"]
        config["ingest"] |= {"max_prompts": n_prompts}
        with worker(server, "worker"):
            run = server.wait(server.run("pipeline/default", config=config), seconds=3600)
        assert run["state"]["type"] == "COMPLETED", server.logs(run["id"])
        _report(server, run)


def _report(server: Server, run: Mapping[str, Any]) -> None:
    mine = {"flow_runs": {"parent_flow_run_id": {"any_": [run["id"]]}}, "sort": "START_TIME_ASC"}
    stages = server.call("POST", "/flow_runs/filter", mine)
    wanted = {"task_runs": {"flow_run_id": {"any_": [stage["id"] for stage in stages]}}}
    whole, in_stages = _seconds(run), sum(map(_seconds, stages))
    in_tasks = sum(map(_seconds, server.call("POST", "/task_runs/filter", wanted)))
    before = _seconds({"start_time": run["start_time"], "end_time": stages[0]["start_time"]})
    parts = {
        "in tasks": in_tasks,
        "in flows, beside their tasks": in_stages - in_tasks,
        "between stages": whole - in_stages - before,
        "before the first stage": before,
    }
    for what, seconds in parts.items():
        print(f"{what:<34} {seconds:8.1f} s {seconds / whole:8.1%}")
    print(f"{'the pipeline':<34} {whole:8.1f} s")
    imports = min(_import_seconds() for _ in range(2))
    print(
        f"{'torch and transformers, imported':<34} {imports:8.1f} s {imports / whole:8.1%}  (a part of what is before)"
    )
    overhead = whole - in_tasks - imports
    print(f"{'what no task and no import takes':<34} {overhead:8.1f} s {overhead / whole:8.1%}")


def _import_seconds() -> float:
    """With transformers, as a run imports them, of a process that does nothing else."""
    code = (
        "import time; from tasks.models import import_torch; t = time.perf_counter(); import_torch(); "
        "print(time.perf_counter() - t)"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--pipeline", action="store_true", help="run the deployed pipeline instead: minutes")
    parser.add_argument("--prompts", type=int, default=400, help="of the pipeline")
    arguments = parser.parse_args()
    count = arguments.shards
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    if arguments.pipeline:
        pipeline(arguments.prompts)
        return
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
