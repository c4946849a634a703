"""Deployed runs, on a real worker: what they make, how they are called, and what they show."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.lake import Lake
from tasks.assets import MADE
from tests.servers.prefect import Server, wait_until, winnow, worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
SMALL = {
    "name": "small",
    "ingest": {"max_prompts": 6, "max_heldout": 3},
    "generate": {"n": 4, "shard_prompts": 3, "threads": 1, "max_new_tokens": 64},
    "score": {"threads": 1},
    "finetune": {"epochs": 1, "threads": 1},
    "evaluate": {"samples": 1, "threads": 1},
}


@pytest.fixture(scope="module", autouse=True)
def a_worker(server: Server) -> Iterator[None]:
    """One for all tests here."""
    with worker(server, "worker"):
        yield


@pytest.fixture(scope="module")
def finished(server: Server) -> str:
    """A pipeline that was started through the API, as the UI does it."""
    run_id = server.run("pipeline/default", config=SMALL)
    assert server.wait(run_id)["state"]["type"] == "COMPLETED", server.logs(run_id)
    return run_id


def _artifacts(server: Server, key: str) -> list[dict[str, str]]:
    wanted = {"artifacts": {"key": {"like_": key}}, "limit": 200}
    return server.call("POST", "/artifacts/filter", wanted)  # type: ignore[no-any-return]


def test_runs_are_called_by_what_they_make(server: Server, server_lake: Path, finished: str) -> None:
    lake = Lake.open(str(server_lake))
    bundle = lake.resolve("bundles/small")
    assert server.flow_run(finished)["name"] == f"pipeline small@{bundle.version}"
    names = {run["name"] for run in server.call("POST", "/flow_runs/filter", {"sort": "START_TIME_DESC"})}
    candidates = lake.manifests("candidates", "small")
    assert {f"{one.stage} small@{one.version}" for one in candidates} <= names
    assert f"finetune small@{lake.resolve('models/small').version}" in names


def test_the_same_run_again_runs_no_stage(server: Server, server_lake: Path, finished: str) -> None:
    made = {one.label: one.created_at for one in Lake.open(str(server_lake)).manifests()}
    again = server.run("pipeline/default", config=SMALL)
    found = server.wait(again)
    assert found["state"]["type"] == "COMPLETED"
    wait_until(lambda: "in-the-lake stage=pipeline" in server.logs(again), "the run's log")
    children = {"flow_runs": {"parent_flow_run_id": {"any_": [again]}}}
    assert server.call("POST", "/flow_runs/filter", children) == []
    tasks = {"task_runs": {"flow_run_id": {"any_": [again]}}}
    assert server.call("POST", "/task_runs/filter", tasks) == []
    assert {one.label: one.created_at for one in Lake.open(str(server_lake)).manifests()} == made


def test_artifacts_say_what_was_made_where_and_how_far_it_got(server: Server, server_lake: Path, finished: str) -> None:
    summary, *others = _artifacts(server, "preferences-small-summary")
    assert others == []
    ref = Lake.open(str(server_lake)).resolve("preferences/small")
    assert f"Dataset: [{ref.uri}]" in summary["data"]
    assert f"winnow report {ref} --lake {server_lake}" in summary["data"]
    shown = _artifacts(server, "small-generate-")
    assert {one["key"] for one in shown} == {"small-generate-1-of-2", "small-generate-2-of-2"}
    for one in shown:
        assert float(one["data"]) == 100.0
        assert re.fullmatch(
            r"small generate \d of 2: 3 of 3 prompts; [\d,]+ tokens, [\d,]+ per second; took [\d.]+ \w+",
            one["description"],
        )
    assert all(len(json.dumps(one["data"])) < 1_500_000 for one in _artifacts(server, "small"))


def test_versions_are_assets_with_what_they_were_made_from(server: Server, server_lake: Path, finished: str) -> None:
    lake = Lake.open(str(server_lake))
    pairs, scored = lake.resolve("preferences/small"), lake.manifest(lake.resolve("preferences/small")).inputs
    wanted = {"filter": {"event": {"name": [MADE]}, "resource": {"id": [f"file://{pairs.uri}"]}}}
    wait_until(lambda: server.call("POST", "/events/filter", wanted)["events"] != [], "the event")
    (event,) = server.call("POST", "/events/filter", wanted)["events"]
    assert event["resource"]["prefect.resource.name"] == str(pairs)
    roles = {one["prefect.resource.id"]: one["prefect.resource.role"] for one in event["related"]}
    assert roles[f"file://{lake.resolve(scored['candidates']).uri}"] == "asset"
    assert any(one["prefect.resource.id"].startswith("prefect.flow-run.") for one in event["related"])


def test_logs_name_stage_version_and_shard(server: Server, server_lake: Path, finished: str) -> None:
    drawn = next(one for one in Lake.open(str(server_lake)).manifests("candidates", "small") if one.stage == "generate")
    mine = {
        "flow_runs": {"parent_flow_run_id": {"any_": [finished]}, "name": {"any_": [f"generate small@{drawn.version}"]}}
    }
    (stage,) = server.call("POST", "/flow_runs/filter", mine)

    def shards() -> list[str]:
        texts = server.logs(stage["id"]).splitlines()
        return [text for text in texts if text.startswith(f"shard-done stage=generate version={drawn.label} ")]

    wait_until(lambda: len(shards()) == 2, "the log of the stage")
    assert sorted(re.search(r"shard=(\d/\d) prompts=3 candidates=12 tokens=\d+", text)[1] for text in shards()) == [  # type: ignore[index]
        "1/2",
        "2/2",
    ]


def test_a_wrong_combination_fails_at_once_and_says_why(server: Server) -> None:
    run_id = server.run("generate/default", config={"n": 400, "max_rows": 16})
    found = server.wait(run_id)
    assert found["state"]["type"] == "FAILED"
    assert "n = 400 is above max_rows = 16; raise max_rows" in found["state"]["message"] + server.logs(run_id)


def test_the_lake_counts_what_every_run_took(server: Server, server_lake: Path, finished: str) -> None:
    told = json.loads(winnow(server, "runs", "--lake", str(server_lake), "--json").stdout)["runs"]
    by_stage = {run["stage"]: run for run in told if "/small" in run["ref"]}
    drawn, scored = by_stage["generate"], by_stage["score"]
    assert drawn["prompts"] == 6 and drawn["rows"] == 24
    assert drawn["tokens"] > 24 and drawn["cuts"] > 0 and drawn["reward_calls"] >= 24 and drawn["bytes"] > 1000
    assert scored["reward_calls"] == 24 - drawn["cuts"]
    assert by_stage["finetune"]["tokens"] > 0 and by_stage["evaluate"]["tokens"] > 0
