"""What starts, stops and reports runs: the approval gate, new files, messages, `winnow serve`; and two machines."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from storage.lake import Lake
from storage.writer import Shard
from tests.infra.test_faults import GENERATE
from tests.infra.test_worker import SMALL
from tests.servers.answering import Asked, answering
from tests.servers.buckets import new_lake, use_endpoint
from tests.servers.prefect import ROOT, Server, is_idle, prefect_server, start, stop, wait_until, winnow, worker
from tests.servers.processes import moto

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.fixture
def a_worker(server: Server, request: pytest.FixtureRequest) -> Iterator["subprocess.Popen[bytes]"]:
    """For one test."""
    with worker(server, f"worker-{request.node.name[:30]}") as process:
        yield process


def _gated(server: Server, process: "subprocess.Popen[bytes]", lake: Path) -> str:
    execution = {"approve_training": True}
    run_id = server.run("pipeline/default", config=SMALL | {"name": "gated"}, lake=str(lake), execution=execution)
    assert server.wait(run_id, ("Suspended", "FAILED", "CRASHED"))["state"]["name"] == "Suspended", server.logs(run_id)
    # Prefect's worker dies when a run comes back while its last process is still ending; people are not that quick.
    wait_until(lambda: is_idle(process), "the end of the suspended run's process")
    time.sleep(5)
    return run_id


def _answer(server: Server, run_id: str, approved: bool) -> None:
    answer = {"run_input": {"approved": approved, "note": "looked at ten pairs"}}
    server.call("POST", f"/flow_runs/{run_id}/resume", answer)


def test_a_pipeline_waits_for_approval_and_goes_on_from_there(
    server: Server, a_worker: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    run_id = _gated(server, a_worker, tmp_path / "lake")
    lake = Lake.open(str(tmp_path / "lake"))
    assert lake.find("preferences", "gated") and not lake.find("models", "gated")
    made = {one.label: one.created_at for one in lake.manifests()}
    _answer(server, run_id, approved=True)
    assert server.wait(run_id)["state"]["type"] == "COMPLETED", server.logs(run_id)
    assert lake.find("models", "gated")
    assert made.items() <= {one.label: one.created_at for one in lake.manifests()}.items()
    # The model is there: nothing is left to ask about.
    again = server.run(
        "pipeline/default",
        config=SMALL | {"name": "gated"},
        lake=str(tmp_path / "lake"),
        execution={"approve_training": True},
    )
    assert server.wait(again)["state"]["type"] == "COMPLETED"


def test_a_pipeline_that_is_not_approved_trains_nothing(
    server: Server, a_worker: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    run_id = _gated(server, a_worker, tmp_path / "lake")
    _answer(server, run_id, approved=False)
    assert server.wait(run_id)["state"]["type"] == "FAILED"
    wait_until(lambda: "training was not approved: looked at ten pairs" in server.logs(run_id), "the reason")
    assert not Lake.open(str(tmp_path / "lake")).find("models", "gated")


def test_a_new_file_under_a_prefix_starts_one_pipeline(server: Server, tmp_path: Path) -> None:
    incoming = tmp_path / "incoming"
    incoming.mkdir()
    rows = [{"prompt": f"What is {i} + 1 ?", "group": "ab"[i % 2]} for i in range(6)]
    (incoming / "First Batch.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (incoming / "notes.txt").write_text("no prompts")
    values = {"name": "in", "prefix": str(incoming), "settle_seconds": 0, "deployment": "pipeline/default"}
    look = f"from flows.watch import watch; watch({values!r}, {str(tmp_path / 'lake')!r})"

    def watch() -> list[dict[str, object]]:
        # Here, not on a worker, which would be busy with what was started.
        command = [sys.executable, "-c", look]
        done = subprocess.run(command, env=server.environment(), capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        mine = {"deployments": {"id": {"any_": [server.deployment("pipeline/default")["id"]]}}}
        found = server.call("POST", "/flow_runs/filter", mine)
        return [run for run in found if run["parameters"].get("lake") == str(tmp_path / "lake")]

    first = watch()
    assert [run["parameters"]["config"]["name"] for run in first] == ["in-first-batch"]  # type: ignore[index]
    assert [run["parameters"]["config"]["ingest"]["source"] for run in first] == [  # type: ignore[index]
        str(incoming / "First Batch.jsonl")
    ]
    assert [run["id"] for run in watch()] == [run["id"] for run in first]
    (incoming / "First Batch.jsonl").write_text(json.dumps({"prompt": "another"}) + "\n")
    assert len(watch()) == 2
    for run in watch():
        server.call("POST", f"/flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLED"}, "force": True})


def test_a_failed_run_is_told_through_the_block_that_was_named(server: Server, tmp_path: Path) -> None:
    told: list[dict[str, str]] = []

    def mine() -> list[dict[str, str]]:
        return [one for one in told if one["subject"] == "Winnow: generate generate-none is Failed"]

    def receive(asked: Asked) -> tuple[int, object]:
        told.append(asked.body)
        return 200, {}

    with answering(receive) as url:
        kind = server.call("GET", "/block_types/slug/custom-webhook")
        schemas = server.call(
            "POST", "/block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [kind["id"]]}}}
        )
        data = {
            "name": "receiver",
            "url": f"{url}/",
            "json_data": {"subject": "{{subject}}", "body": "{{body}}"},
            "allow_private_urls": True,
        }
        block = {"name": "receiver", "block_type_id": kind["id"], "block_schema_id": schemas[0]["id"], "data": data}
        server.call("POST", "/block_documents/", block)
        wrong = winnow(server, "deploy", "--lake", str(server.folder / "lake"), "--notify", "custom-webhook/nobody")
        assert wrong.returncode == 2 and "is no block" in wrong.stderr
        done = winnow(server, "deploy", "--lake", str(server.folder / "lake"), "--notify", "custom-webhook/receiver")
        assert done.returncode == 0, done.stderr
        with worker(server, "failing"):
            run_id = server.run("generate/default", config={"name": "none"}, lake=str(tmp_path / "empty"))
            assert server.wait(run_id)["state"]["type"] == "FAILED"
            wait_until(lambda: bool(mine()), "the message", seconds=60)
    assert '"prompts/none" is not in the lake' in mine()[0]["body"]


def _crashed_worker(server: Server, lake: Path) -> str:
    """A run that was killed together with its worker."""
    values = {"config": GENERATE | {"name": "long", "n": 16}, "lake": str(lake)}
    _prompts(lake)
    with worker(server, "gone"):
        run_id = server.run("generate/default", **values)
        server.wait(run_id, ("RUNNING",))
        wait_until(lambda: "will-be-made" in server.logs(run_id), "its first words")
    return run_id


def _prompts(lake: Path) -> None:
    from tasks import ingest
    from tasks.settings import IngestConfig

    ingest.ingest.fn(ingest.prepare(IngestConfig(name="long", max_prompts=200, max_heldout=2)), str(lake))


def test_a_run_that_is_cancelled_when_its_worker_is_gone_is_cancelled(server: Server, tmp_path: Path) -> None:
    run_id = _crashed_worker(server, tmp_path / "lake")
    state = {"state": {"type": "CANCELLING", "name": "Cancelling"}, "force": False}
    server.call("POST", f"/flow_runs/{run_id}/set_state", state)
    # infra/automations/stuck-cancelling-runs.yaml: two minutes, and the server looks now and then.
    assert server.wait(run_id, ("CANCELLED", "CRASHED"), seconds=300)["state"]["type"] == "CANCELLED"


def test_a_run_without_end_is_cancelled(server: Server, tmp_path: Path) -> None:
    """The shipped automation, with seconds for its day."""
    endless = yaml.safe_load((ROOT / "infra" / "automations" / "endless-runs.yaml").read_text())
    assert endless["trigger"]["within"] == 24 * 3600
    endless["trigger"]["within"] = 20
    made = server.call("POST", "/automations/", endless | {"name": "endless in a test"})
    try:
        _prompts(tmp_path / "lake")
        with worker(server, "endless"):
            config = GENERATE | {"name": "long", "n": 16}
            run_id = server.run("generate/default", config=config, lake=str(tmp_path / "lake"))
            assert server.wait(run_id, seconds=400)["state"]["type"] == "CANCELLED"
    finally:
        server.call("DELETE", f"/automations/{made['id']}")


def test_serve_runs_what_the_server_asks_for_without_a_worker(tmp_path: Path) -> None:
    with prefect_server(tmp_path / "prefect") as server:
        command = [sys.executable, "-m", "flows.cli", "serve", "--lake", str(tmp_path / "lake")]
        process = start(command, server.environment(), tmp_path / "serve.log")
        try:
            wait_until(
                lambda: len(server.call("POST", "/deployments/filter", {"limit": 100})) == 15, "the deployments", 200
            )
            run_id = server.run("ingest/default", config={"name": "served", "max_prompts": 5})
            assert server.wait(run_id)["state"]["type"] == "COMPLETED", server.logs(run_id)
            assert Lake.open(str(tmp_path / "lake")).find("prompts", "served")
            automations = {one["name"] for one in server.call("POST", "/automations/filter", {})}
            assert {"winnow: zombie runs", "winnow: restart crashed runs"} <= automations
            active = [s["active"] for s in server.deployment("pipeline/default")["schedules"]]
            assert active == [True]
            os.kill(process.pid, signal.SIGINT)
            wait_until(lambda: process.poll() is not None, "the end of serve")
            assert server.deployment("pipeline/default")["paused"] is True
        finally:
            stop(process)


def test_a_machine_goes_on_from_the_lake_on_s3_where_another_one_was_lost(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker has a home, a cache, a temporary folder and a working folder of its own."""
    with moto(tmp_path) as url:
        use_endpoint(monkeypatch, url)
        root = new_lake(tmp_path / "cache", monkeypatch)
        variables = []
        for name in ("one", "two"):
            folder = tmp_path / name
            (folder / "tmp").mkdir(parents=True)
            own = {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), "TMPDIR": str(folder / "tmp")}
            variables.append(own)
        ingest = {"name": "fault", "max_prompts": 24, "max_heldout": 2}
        with worker(server, "one", **variables[0]):
            for flow, config in (("ingest", ingest), ("generate", GENERATE | {"name": "fault"})):
                run_id = server.run(f"{flow}/default", config=config, lake=root)
                assert server.wait(run_id)["state"]["type"] == "COMPLETED", server.logs(run_id)
        shutil.rmtree(tmp_path / "one")
        with worker(server, "two", **variables[1]):
            for flow in ("score", "assemble", "finetune", "export"):
                run_id = server.run(f"{flow}/default", config={"name": "fault"}, lake=root)
                assert server.wait(run_id)["state"]["type"] == "COMPLETED", server.logs(run_id)
        from tasks import generate
        from tasks import ingest as ingesting
        from tasks.settings import GenerateConfig, IngestConfig

        local = str(tmp_path / "lake")
        ingesting.ingest.fn(ingesting.prepare(IngestConfig.model_validate(ingest)), local)
        step = generate.prepare(GenerateConfig.model_validate(GENERATE | {"name": "fault"}), Lake.open(local))
        generate.generate_shard.fn(step, local, 5, 12)
        far = Lake.open(root).manifest(Lake.open(root).ref("candidates", "fault", step.version))
        here = step.writer(Lake.open(local))
        shard = Shard("candidates", "train", 5, 12)
        assert here.has(shard)
        assert {file.path: file.sha256 for file in far.files}[shard.path] == here.files[shard.path].sha256
        assert Lake.open(root).find("bundles", "fault")
