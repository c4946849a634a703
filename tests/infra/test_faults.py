"""What happens in production: workers, servers and databases that go away, cancelled runs, the same run twice."""

import hashlib
import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from storage.lake import Lake
from tests.servers.postgres import INSTALL, postgres, programs
from tests.servers.prefect import Server, deployed_server, prefect_server, wait_until, winnow, worker
from tests.tasks.gate import GATE, N_BEFORE, SHARD_PROMPTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
# On SQLite, a server under load loses what automations wait for ("database is locked", four times).
by_automations = pytest.mark.skipif(programs() is None, reason=f"no PostgreSQL server here; {INSTALL}")
N_SHARDS = 8
GENERATE = {"n": 8, "shard_prompts": SHARD_PROMPTS, "threads": 1, "max_new_tokens": 96, "max_rows": 16}
GATED = GENERATE | {"reward": "function", "reward_function": "tests.tasks.gate:n_letters"}
PIPELINE = {
    "name": "twice",
    "ingest": {"max_prompts": 4, "max_heldout": 2},
    "generate": {"n": 4, "threads": 1, "max_new_tokens": 48},
    "score": {"threads": 1},
    "finetune": {"epochs": 1, "threads": 1},
    "evaluate": {"samples": 1, "threads": 1},
}


def _stages(server: Server, run_id: str, state: str) -> list[str]:
    """Ids of the stages of a pipeline that are in a state."""
    mine = {"flow_runs": {"parent_flow_run_id": {"any_": [run_id]}, "state": {"type": {"any_": [state]}}}}
    return [run["id"] for run in server.call("POST", "/flow_runs/filter", mine)]


def _shards(lake: Path) -> dict[str, str]:
    files = (file for file in lake.rglob("candidates/train-*.parquet") if ".tmp" not in file.parts)
    return {str(file.relative_to(lake)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The shards of a run that nothing disturbed, without Prefect."""
    from tasks import generate
    from tasks.settings import GenerateConfig

    lake = _with_prompts(tmp_path_factory.mktemp("undisturbed") / "lake")
    step = generate.prepare(GenerateConfig.model_validate(GATED | {"name": "fault"}), Lake.open(str(lake)))
    for index in range(generate.count_shards(step, str(lake))):
        generate.generate_shard.fn(step, str(lake), index, N_SHARDS)
    generate.publish.fn(step, str(lake), N_SHARDS)
    return _shards(lake)


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    """With prompts for all shards."""
    return _with_prompts(tmp_path / "lake")


def _with_prompts(root: Path) -> Path:
    from tasks import ingest
    from tasks.settings import IngestConfig

    config = IngestConfig(name="fault", max_prompts=SHARD_PROMPTS * N_SHARDS, max_heldout=2)
    ingest.ingest.fn(ingest.prepare(config), str(root))
    return root


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """Runs that are told of it stop in their fourth shard until it is there."""
    return tmp_path / "gate"


def _start(server: Server, lake: Path) -> str:
    return server.run("generate/default", config=GATED | {"name": "fault"}, lake=str(lake))


def _wait_for_half(lake: Path) -> None:
    wait_until(lambda: len(_shards(lake)) == N_BEFORE, "the shards before the gate")


def _has_beat(server: Server, run_ids: list[str]) -> bool:
    """Whether the server knows that these runs are alive."""
    resources = [f"prefect.flow-run.{run_id}" for run_id in run_ids]
    wanted = {"filter": {"event": {"name": ["prefect.flow-run.heartbeat"]}, "resource": {"id": resources}}}
    events = server.call("POST", "/events/filter", wanted)["events"]
    return {event["resource"]["prefect.resource.id"] for event in events} == set(resources)


def _check(lake: Path, expected: dict[str, str]) -> None:
    assert _shards(lake) == expected
    assert len(Lake.open(str(lake)).manifests("candidates")) == 1


@by_automations
def test_a_run_killed_with_its_worker_is_found_out_and_started_again_by_the_next_worker(
    server: Server, lake: Path, tmp_path: Path, gate: Path, expected: dict[str, str]
) -> None:
    prompts = {"max_prompts": SHARD_PROMPTS * N_SHARDS, "max_heldout": 2}
    whole = {"config": PIPELINE | {"ingest": prompts, "generate": GATED}, "lake": str(tmp_path / "other")}
    gated = {GATE: str(gate)}
    with worker(server, "doomed", **gated), worker(server, "doomed-too", **gated):
        pipeline, run_id = server.run("pipeline/default", **whole), _start(server, lake)
        _wait_for_half(tmp_path / "other")
        _wait_for_half(lake)
        (stage,) = _stages(server, pipeline, "RUNNING")
        wait_until(lambda: _has_beat(server, [run_id, pipeline, stage]), "the first heartbeats")
    # Nobody is left who could tell the server; only the missing heartbeat does.
    assert server.flow_run(run_id)["state"]["type"] == "RUNNING"
    done = _shards(lake)
    gate.touch()
    wait_until(lambda: _stages(server, pipeline, "RUNNING") == [], "the end of the stage as well", seconds=600)
    assert _stages(server, pipeline, "CRASHED") == [stage]
    with worker(server, "heir"):
        found = server.wait(run_id, ("COMPLETED", "FAILED"))
        assert found["state"]["type"] == "COMPLETED", server.logs(run_id)
        assert found["run_count"] == 2
        assert server.wait(pipeline, ("COMPLETED", "FAILED"))["state"]["type"] == "COMPLETED", server.logs(pipeline)
    _check(lake, expected)
    assert done.items() <= expected.items()


@by_automations
@pytest.mark.long
def test_a_run_killed_alone_is_started_again_by_its_worker(
    server: Server, lake: Path, gate: Path, expected: dict[str, str]
) -> None:
    with worker(server, "survivor", **{GATE: str(gate)}) as process:
        run_id = _start(server, lake)
        _wait_for_half(lake)
        (child,) = _children(process.pid)
        os.kill(child, signal.SIGKILL)
        gate.touch()
        assert server.wait(run_id, ("COMPLETED", "FAILED"))["state"]["type"] == "COMPLETED", server.logs(run_id)
        assert process.poll() is None
    _check(lake, expected)


def _children(pid: int) -> list[int]:
    found = [path.read_text().split() for path in Path("/proc", str(pid), "task").glob("*/children")]
    return [int(child) for each in found for child in each]


@by_automations
@pytest.mark.long
def test_a_worker_killed_alone_takes_its_run_down_and_the_next_one_continues_it(
    server: Server, lake: Path, gate: Path, expected: dict[str, str]
) -> None:
    with worker(server, "killed", **{GATE: str(gate)}) as process:
        run_id = _start(server, lake)
        _wait_for_half(lake)
        os.kill(process.pid, signal.SIGKILL)
        gate.touch()  # the run notices when it says something and nobody listens
        wait_until(lambda: server.flow_run(run_id)["state"]["type"] != "RUNNING", "the end of the run")
    with worker(server, "next"):
        assert server.wait(run_id, ("COMPLETED", "FAILED"))["state"]["type"] == "COMPLETED", server.logs(run_id)
    _check(lake, expected)


def test_a_cancelled_run_stops_publishes_nothing_and_can_be_continued(
    server: Server, lake: Path, gate: Path, expected: dict[str, str]
) -> None:
    with worker(server, "patient", **{GATE: str(gate)}):
        run_id = _start(server, lake)
        _wait_for_half(lake)
        state = {"state": {"type": "CANCELLING", "name": "Cancelling"}, "force": False}
        server.call("POST", f"/flow_runs/{run_id}/set_state", state)
        assert server.wait(run_id)["state"]["type"] == "CANCELLED"
        left = _shards(lake)
        assert len(left) == N_BEFORE
        assert Lake.open(str(lake)).manifests("candidates") == []
        gate.touch()
        time.sleep(3)
        assert _shards(lake) == left  # whatever computed is gone
        again = _start(server, lake)
        assert server.wait(again)["state"]["type"] == "COMPLETED", server.logs(again)
    _check(lake, expected)


def test_a_run_outlives_a_server_that_is_restarted(
    server: Server, lake: Path, gate: Path, expected: dict[str, str]
) -> None:
    with worker(server, "steady", **{GATE: str(gate)}):
        run_id = _start(server, lake)
        _wait_for_half(lake)
        server.stop()
        gate.touch()
        time.sleep(10)
        server.start()
        assert server.wait(run_id)["state"]["type"] == "COMPLETED", server.logs(run_id)
    _check(lake, expected)


@pytest.mark.long
def test_a_run_outlives_a_database_that_is_locked_for_half_a_minute(
    lake: Path, tmp_path: Path, gate: Path, expected: dict[str, str]
) -> None:
    with deployed_server(tmp_path / "prefect", lake) as server, worker(server, "calm", **{GATE: str(gate)}):
        run_id = _start(server, lake)
        _wait_for_half(lake)
        with sqlite3.connect(server.folder / "server" / "prefect.db", timeout=60, isolation_level=None) as database:
            database.execute("BEGIN EXCLUSIVE")
            gate.touch()
            time.sleep(30)
            database.execute("ROLLBACK")
        assert server.wait(run_id)["state"]["type"] == "COMPLETED", server.logs(run_id)
    _check(lake, expected)


@pytest.mark.skipif(programs() is None, reason=f"no PostgreSQL server here; {INSTALL}")
def test_a_run_outlives_a_database_that_is_gone_for_half_a_minute(
    lake: Path, tmp_path: Path, gate: Path, expected: dict[str, str]
) -> None:
    with (
        postgres() as database,
        deployed_server(tmp_path / "prefect", lake, PREFECT_API_DATABASE_CONNECTION_URL=database.url) as server,
        worker(server, "patient", **{GATE: str(gate)}),
    ):
        run_id = _start(server, lake)
        _wait_for_half(lake)
        database.stop()
        gate.touch()
        time.sleep(30)
        database.start()
        assert server.wait(run_id)["state"]["type"] == "COMPLETED", server.logs(run_id)
        assert server.flow_run(run_id)["run_count"] == 1
    _check(lake, expected)
    (made,) = Lake.open(str(lake)).manifests("candidates")
    assert (
        sum(file.rows or 0 for file in made.files if file.table == "candidates")
        == SHARD_PROMPTS * N_SHARDS * GENERATE["n"]
    )


@pytest.mark.long
def test_the_same_run_twice_at_once_makes_one_version(server: Server, lake: Path, expected: dict[str, str]) -> None:
    with worker(server, "left"), worker(server, "right"):
        runs = [_start(server, lake), _start(server, lake)]
        assert [server.wait(run)["state"]["type"] for run in runs] == ["COMPLETED", "COMPLETED"]
    _check(lake, expected)


def test_a_scheduled_pipeline_waits_for_the_one_that_runs_and_finds_its_result(server: Server, tmp_path: Path) -> None:
    with worker(server, "first"), worker(server, "second"):
        runs = [server.run("pipeline/default", config=PIPELINE, lake=str(tmp_path / "lake")) for _ in range(2)]
        assert [server.wait(run)["state"]["type"] for run in runs] == ["COMPLETED", "COMPLETED"]
    children = [
        server.call("POST", "/flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}}) for run in runs
    ]
    assert sorted(map(len, children)) == [0, 7]


def test_a_server_with_a_password_takes_the_right_one_only(tmp_path: Path) -> None:
    with prefect_server(tmp_path / "closed", auth=("winnow", "right")) as server:
        refused = winnow(server, "deploy", PREFECT_API_AUTH_STRING="winnow:wrong")
        assert refused.returncode == 2
        (line,) = [text for text in refused.stderr.splitlines() if text.startswith("error:")]
        assert "PREFECT_API_AUTH_STRING is refused; set USER:PASSWORD" in line
        assert "Traceback" not in refused.stderr and "wrong" not in refused.stderr
        assert "is not set" in winnow(server, "deploy", PREFECT_API_AUTH_STRING="").stderr
        assert winnow(server, "deploy", "--lake", str(tmp_path / "lake")).returncode == 0
        with worker(server, "trusted"):
            run_id = server.run("ingest/default", config={"name": "closed", "max_prompts": 5})
            assert server.wait(run_id)["state"]["type"] == "COMPLETED", server.logs(run_id)
        assert Lake.open(str(tmp_path / "lake")).find("prompts", "closed") is not None
