"""`winnow deploy` and prefect.yaml: every flow, the schedules and the automations, on a real server."""

import json
from pathlib import Path

import httpx
import pytest

from flows.deployments import Place, code_version, read_file
from tasks.errors import ConfigError
from tests.flows.test_schema import FLOWS
from tests.servers.prefect import ROOT, Server, deployed_server, wait_until, winnow

PLACE = Place(ROOT / "prefect.yaml", "/work", "/lake")


def test_every_flow_has_one_deployment_and_three_have_a_schedule() -> None:
    listed = read_file(PLACE)
    assert sorted(one["entrypoint"] for one in listed) == sorted(f"flows.{name}.{name}" for name in FLOWS)
    assert {one["name"] for one in listed} == {"default"}
    assert all("winnow" in one["tags"] for one in listed)  # which the automations look for
    scheduled = {one["entrypoint"]: [when["slug"] for when in one["schedules"]] for one in listed if "schedules" in one}
    assert scheduled == {
        "flows.pipeline.pipeline": ["nightly"],
        "flows.evaluate.evaluate": ["weekly"],
        "flows.watch.watch": ["every-five-minutes"],
    }


def test_a_scheduled_deployment_has_all_parameters_that_its_flow_needs() -> None:
    from prefect.flows import load_flow_from_entrypoint

    for one in read_file(PLACE):
        flow = load_flow_from_entrypoint(one["entrypoint"])
        needed = set(flow.parameters.required)
        if "schedules" in one:
            assert needed <= set(one["parameters"])
            flow.validate_parameters(one["parameters"])
        else:
            assert needed - set(one["parameters"]) == {"config"}


@pytest.mark.parametrize(
    "text, message",
    [(None, "does not exist; run this in a checkout"), ("a: [", "cannot be read"), ("a: 1", "lists no deployments")],
)
def test_a_file_that_lists_nothing_is_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "mine.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_file(Place(file, "/work", "/lake"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_deploying_twice_leaves_one_of_each(server: Server, server_lake: Path) -> None:
    again = winnow(server, "deploy", "--lake", str(server_lake), "--json")
    assert again.returncode == 0, again.stderr
    told = json.loads(again.stdout)
    counts = ", ".join(f"{len(told[what])} {what}" for what in ("deployments", "schedules", "automations"))
    for page in ("README.md", "docs/operations.md"):
        assert f"winnow deploy                                      # {counts}" in (ROOT / page).read_text()
    there = server.call("POST", "/deployments/filter", {"limit": 100})
    assert len(there) == len(told["deployments"]) == len(FLOWS)
    for one in there:
        assert one["parameters"]["lake"] == str(server_lake)
        assert one["version"] == code_version()
        assert one["enforce_parameter_schema"] is True
    schedules = [(one["schedule"]["cron"], one["active"]) for found in there for one in found["schedules"]]
    assert sorted(schedules) == [("*/5 * * * *", False), ("0 2 * * *", True), ("0 5 * * 0", True)]
    automations = server.call("POST", "/automations/filter", {})
    assert (
        sorted(one["name"] for one in automations)
        == told["automations"]
        == [f"winnow: {which} runs" for which in ("endless", "restart crashed", "stuck cancelling", "zombie")]
    )


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_cron_deployment_gets_its_scheduled_runs(tmp_path: Path) -> None:
    with deployed_server(tmp_path / "prefect", tmp_path / "lake") as server:
        wanted = {"deployments": {"id": {"any_": [server.deployment("pipeline/default")["id"]]}}}
        wait_until(lambda: bool(server.call("POST", "/flow_runs/filter", wanted)), "a scheduled run")
        runs = server.call("POST", "/flow_runs/filter", wanted)
    assert all(run["auto_scheduled"] and "auto-scheduled" in run["tags"] for run in runs)
    assert {run["expected_start_time"][11:16] for run in runs} == {"02:00"}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "flow, config, field",
    [
        ("generate", {"n": 0}, "config.n"),
        ("generate", {"cut_policy": "sometimes"}, "config.cut_policy"),
        ("pipeline", {"finetune": {"method": "magic"}}, "config.finetune.method"),
        ("pipeline", {"generate": {"nn": 3}}, "nn"),
    ],
)
def test_a_wrong_value_is_refused_before_a_run_is_made_and_the_field_is_named(
    server: Server, flow: str, config: dict[str, object], field: str
) -> None:
    mine = {"deployments": {"id": {"any_": [server.deployment(f"{flow}/default")["id"]]}}}
    before = {run["id"] for run in server.call("POST", "/flow_runs/filter", mine)}
    with pytest.raises(httpx.HTTPStatusError) as refused:
        server.run(f"{flow}/default", config=config)
    assert refused.value.response.status_code == 409
    assert field in refused.value.response.json()["detail"]
    after = server.call("POST", "/flow_runs/filter", mine)
    assert all(run["id"] in before or run["auto_scheduled"] for run in after)
