"""Runs with several workers that are cancelled: gone within seconds, with all their processes, and continued later."""

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.lake import Lake
from tasks.settings import PipelineConfig
from tests.infra.test_faults import GENERATE, N_SHARDS
from tests.servers.answering import Asked, answering
from tests.servers.prefect import Server, is_idle, wait_until, worker
from tests.tasks.test_chain import config, run_chain
from tests.tasks.test_launch import alive

__all__ = ["config"]  # fixture
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def _shards(lake: Path) -> dict[str, str]:
    files = (file for file in lake.rglob("candidates/train-*.parquet") if ".tmp" not in file.parts)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _with_prompts(root: Path) -> Path:
    from tasks import ingest
    from tasks.settings import IngestConfig

    config = IngestConfig(name="fault", max_prompts=2 * N_SHARDS, max_heldout=2)
    ingest.ingest.fn(ingest.prepare(config), str(root))
    return root


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The shards of a run in one process that nothing disturbed, without Prefect."""
    from tasks import generate
    from tasks.settings import GenerateConfig

    root = str(_with_prompts(tmp_path_factory.mktemp("undisturbed") / "lake"))
    step = generate.prepare(GenerateConfig.model_validate(GENERATE | {"name": "fault"}), Lake.open(root))
    for index in range(N_SHARDS):
        generate.generate_shard.fn(step, root, index, N_SHARDS)
    return _shards(Path(root))


def _cancel(server: Server, run_id: str) -> None:
    state = {"state": {"type": "CANCELLING", "name": "Cancelling"}, "force": False}
    server.call("POST", f"/flow_runs/{run_id}/set_state", state)


@pytest.mark.parametrize("runner", [pytest.param("thread", marks=pytest.mark.long), "process"])
def test_two_workers_end_with_their_run_and_the_next_run_goes_on(
    server: Server, runner: str, tmp_path: Path, expected: dict[str, str]
) -> None:
    lake = _with_prompts(tmp_path / "lake")
    execution = {"task_runner": runner, "workers": 2}
    values: dict[str, Any] = {"config": GENERATE | {"name": "fault"}, "lake": str(lake), "execution": execution}
    with worker(server, f"two-{runner}s") as process:
        run_id = server.run("generate/default", **values)
        wait_until(lambda: 2 <= len(_shards(lake)) < N_SHARDS - 4, "some shards", 400)
        _cancel(server, run_id)
        started = time.monotonic()
        assert server.wait(run_id, seconds=60)["state"]["type"] == "CANCELLED", server.logs(run_id)
        wait_until(lambda: is_idle(process), "the end of the run's processes", 30)
        print(f"{runner}: cancelled, and all of it gone after {time.monotonic() - started:.1f} s")
        left = _shards(lake)
        assert len(left) < N_SHARDS
        assert Lake.open(str(lake)).manifests("candidates") == []
        time.sleep(3)
        assert _shards(lake) == left  # no process outlived the run
        again = server.run("generate/default", **values)
        assert server.wait(again, seconds=400)["state"]["type"] == "COMPLETED", server.logs(again)
    assert left.items() <= expected.items()
    assert _shards(lake) == expected


@pytest.fixture
def silent_server() -> Iterator[tuple[str, list[str]]]:
    """A server of the policy that takes requests and never answers them; and what it was asked."""
    closing, asked = threading.Event(), []

    def never(one: Asked) -> tuple[int, object]:
        if one.method == "POST":
            asked.append(one.path)
            closing.wait(600)
        return 200, {"object": "list", "data": []}

    with answering(never) as url:
        try:
            yield f"{url}/v1", asked
        finally:
            closing.set()


@pytest.mark.long
def test_threads_that_wait_for_a_server_end_with_their_run(
    server: Server, tmp_path: Path, silent_server: tuple[str, list[str]]
) -> None:
    lake, (url, asked) = _with_prompts(tmp_path / "lake"), silent_server
    config = GENERATE | {"name": "fault", "server": url, "server_model": "m", "server_timeout": 500}
    with worker(server, "waiting") as process:
        run_id = server.run("generate/default", config=config, lake=str(lake), execution={"workers": 2})
        wait_until(lambda: len(asked) > 1, "requests of both threads", 400)
        _cancel(server, run_id)
        assert server.wait(run_id, seconds=60)["state"]["type"] == "CANCELLED", server.logs(run_id)
        wait_until(lambda: is_idle(process), "the end of the run's process", 30)


def test_a_training_in_two_processes_ends_with_its_run_and_the_next_run_makes_the_model(
    server: Server, tmp_path: Path, config: PipelineConfig
) -> None:
    root = tmp_path / "lake"
    run_chain(config, str(root), until="assemble")
    training = config.stage(config.finetune).model_dump(mode="json") | {"processes": 2}
    with worker(server, "trainer") as process:
        run_id = server.run("finetune/default", config=training | {"epochs": 500}, lake=str(root))
        # torchrun and its two; they name the folder they work in.
        wait_until(lambda: len(alive(str(root))) == 3, "the processes", 400)
        _cancel(server, run_id)
        assert server.wait(run_id, seconds=60)["state"]["type"] == "CANCELLED", server.logs(run_id)
        wait_until(lambda: alive(str(root)) == [] and is_idle(process), "the end of all processes", 60)
        assert Lake.open(str(root)).manifests("models") == []
        again = server.run("finetune/default", config=training, lake=str(root))
        assert server.wait(again, seconds=400)["state"]["type"] == "COMPLETED", server.logs(again)
    assert Lake.open(str(root)).find("models", "tiny") is not None
