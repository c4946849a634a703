"""A person at the Prefect UI: the form of a deployment, a wrong value, the run, its artifacts; in headless Chromium."""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.servers.prefect import Server, wait_until, worker

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
PATIENCE_MS = 300_000


@pytest.fixture(scope="module")
def page() -> "Iterator[Page]":
    """An empty browser."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'winnow[dev]'")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs Chromium: make chromium")
    with api.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=chromium, args=QUIET)
        found = browser.new_page(viewport={"width": 1280, "height": 900})
        found.set_default_timeout(PATIENCE_MS)
        yield found
        browser.close()


@pytest.fixture(scope="module", autouse=True)
def a_worker(server: Server) -> Iterator[None]:
    """With prompts to draw from."""
    with worker(server, "browsed"):
        run_id = server.run("ingest/default", config={"name": "browsed", "max_prompts": 4, "max_heldout": 2})
        assert server.wait(run_id)["state"]["type"] == "COMPLETED"
        yield


def _open_form(server: Server, page: "Page", name: str = "generate/default") -> None:
    deployment = server.deployment(name)
    page.goto(f"{server.url.removesuffix('/api')}/v2/deployments/deployment/{deployment['id']}/run")
    page.get_by_label("Candidates (Optional)").wait_for()


def _n_runs(server: Server, name: str = "generate/default") -> int:
    mine = {"deployments": {"id": {"any_": [server.deployment(name)["id"]]}}}
    return int(server.call("POST", "/flow_runs/count", mine))


def _submit(server: Server, page: "Page") -> None:
    """Until there is one more run; a server that has too much to do refuses, and the person tries again."""
    before, deadline = _n_runs(server), time.monotonic() + 300
    while _n_runs(server) == before:
        assert time.monotonic() < deadline, page.inner_text("body")
        page.get_by_role("button", name="Submit").click()
        with suppress(AssertionError):
            wait_until(lambda: _n_runs(server) > before, "the run that the form starts", seconds=60)


def test_the_form_shows_choices_defaults_and_descriptions(server: Server, page: "Page", tmp_path: Path) -> None:
    _open_form(server, page)
    assert page.get_by_label("Candidates (Optional)").input_value() == "16"
    assert page.get_by_text("Candidates per prompt").is_visible()
    page.get_by_label("Select Cut policy").click()
    offered = {option.inner_text() for option in page.get_by_role("option").all()}
    assert {"none", "schedule", "calibrated", "adaptive", "memory"} <= offered
    page.keyboard.press("Escape")
    # A JSON editor would be a CodeMirror; nothing of ours needs one.
    assert page.locator(".cm-editor").count() == 0


@pytest.mark.parametrize(
    ("label", "value", "field"), [("Candidates (Optional)", "0", ""), ("S3D (Optional)", "sometimes", "pattern")]
)
def test_a_wrong_value_is_shown_where_it_is_and_starts_nothing(
    server: Server, page: "Page", tmp_path: Path, label: str, value: str, field: str
) -> None:
    before = _n_runs(server)
    _open_form(server, page)
    control = page.get_by_label(label)
    control.fill(value)
    page.get_by_role("button", name="Submit").click()
    if field:
        page.get_by_text("does not match").first.wait_for()
    else:
        # The browser itself knows the range.
        assert "greater than or equal to 1" in control.evaluate("element => element.validationMessage")
    page.screenshot(path=tmp_path / "wrong.png")
    assert page.url.endswith("/run")
    assert _n_runs(server) == before


def test_the_form_of_the_pipeline_has_its_stages_in_order_and_refuses_a_wrong_name(
    server: Server, page: "Page", tmp_path: Path
) -> None:
    before = _n_runs(server, "pipeline/default")
    _open_form(server, page, "pipeline/default")
    page.screenshot(path=tmp_path / "pipeline.png")
    stages = ["Ingest", "Generate", "Score", "Assemble", "Fine-tune", "Evaluate", "Export"]
    shown = [label.inner_text().removesuffix(" (Optional)") for label in page.locator("label").all()]
    assert [label for label in shown if label in stages] == stages
    assert page.locator(".cm-editor").count() == 0
    page.get_by_label("Name (Optional)", exact=True).fill("Not a name")
    page.get_by_role("button", name="Submit").click()
    page.get_by_text("does not match").first.wait_for()
    assert page.url.endswith("/run")
    assert _n_runs(server, "pipeline/default") == before


def test_a_run_with_a_thousand_shards_opens_with_its_artifacts(server: Server, page: "Page", tmp_path: Path) -> None:
    run_id = server.run("ingest/default", config={"name": "large", "max_prompts": 1, "max_heldout": 0})
    assert server.wait(run_id)["state"]["type"] == "COMPLETED"
    for index in range(1, 1001):
        key = f"large-generate-{index}-of-1000"
        server.call("POST", "/artifacts/", {"key": key, "type": "progress", "data": 100.0, "flow_run_id": run_id})
    page.goto(f"{server.url.removesuffix('/api')}/v2/runs/flow-run/{run_id}")
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("large-generate-").first.wait_for()
    page.goto(f"{server.url.removesuffix('/api')}/v2/artifacts")
    page.get_by_text("large-generate-").first.wait_for()


def test_a_run_is_started_watched_and_its_artifacts_are_opened(server: Server, page: "Page", tmp_path: Path) -> None:
    _open_form(server, page)
    page.get_by_label("Name (Optional)").first.fill("browsed")
    for label, value in (("Candidates", "4"), ("New tokens", "48"), ("Threads", "1"), ("Shard size", "2")):
        page.get_by_label(f"{label} (Optional)", exact=True).fill(value)
    page.get_by_text("Policy (Optional)", exact=True).scroll_into_view_if_needed()
    page.screenshot(path=tmp_path / "form.png")
    _submit(server, page)
    mine = {"deployments": {"id": {"any_": [server.deployment("generate/default")["id"]]}}, "sort": "START_TIME_DESC"}
    run_id = next(
        run["id"]
        for run in server.call("POST", "/flow_runs/filter", mine)
        if run["parameters"]["config"]["name"] == "browsed"
    )
    assert server.wait(run_id)["state"]["type"] == "COMPLETED", server.logs(run_id)
    page.goto(f"{server.url.removesuffix('/api')}/v2/runs/flow-run/{run_id}")
    page.get_by_text("Completed").first.wait_for()
    page.get_by_text("Beginning flow run").first.wait_for()
    page.screenshot(path=tmp_path / "run.png")
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("candidates-browsed-summary").first.wait_for()
    page.screenshot(path=tmp_path / "artifacts.png")
    page.get_by_text("candidates-browsed-summary").first.click()
    page.get_by_role("link", name=re.compile("^[0-9a-f]{8}$")).first.click()
    page.get_by_text("tokens_decoded").first.wait_for()
    page.screenshot(path=tmp_path / "artifact.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("form", "run", "artifacts", "artifact"))
