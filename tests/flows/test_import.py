"""`winnow import`, as the flow and as the command."""

import json
from pathlib import Path

import pytest

from storage.lake import Lake
from tasks.settings import ImportConfig
from tests.flows.test_cli import _run
from tests.tasks.importers.helpers import write_rows

ROWS = [{"ask": f"{i}?", "good": "yes", "bad": "no", "who": "ab"[i % 2]} for i in range(20)]
COLUMNS = {"prompt_column": "ask", "chosen_column": "good", "rejected_column": "bad", "group_column": "who"}


@pytest.mark.timeout(300)
def test_the_flow_imports_once_and_shows_its_groups(prefect_server: None, tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client

    from flows.import_preferences import import_preferences

    path, root = write_rows(tmp_path / "p.jsonl", ROWS), str(tmp_path / "lake")
    config = ImportConfig.model_validate({"name": "flow-import", "source": str(path)} | COLUMNS)
    first = import_preferences(config, root)
    made = {m.label: m.created_at for m in Lake.open(root).manifests()}
    assert import_preferences(config, root) == first
    assert {m.label: m.created_at for m in Lake.open(root).manifests()} == made
    assert len(made) == 2
    with get_client(sync_client=True) as client:
        keys = {artifact.key for artifact in client.read_artifacts(limit=200)}
    assert {"preferences-flow-import-summary", "preferences-flow-import-table"} <= keys


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_reads_a_configuration_and_prints_one_object(tmp_path: Path) -> None:
    path, lake = write_rows(tmp_path / "p.jsonl", ROWS), tmp_path / "lake"
    settings = "".join(f'{key} = "{value}"\n' for key, value in COLUMNS.items())
    config = tmp_path / "c.toml"
    config.write_text(f'name = "mine"\n[import]\n{settings}test_share = 0.9\n')
    arguments = ["import", str(path), "-c", str(config), "--test-share", "0", "--lake", str(lake), "--json"]
    done = _run(*arguments, PREFECT_HOME=str(tmp_path / "prefect"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ref"].startswith("preferences/mine@")
    assert (found["stats"]["pairs"], found["stats"]["test_pairs"]) == (20, 0)
    assert [(row["group"], row["pairs"]) for row in found["stats"]["groups"]] == [("a", 10), ("b", 10)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.jsonl", "--set", "import.colour=red"], 'unknown key "import_preferences.colour"'),
        (["x.jsonl", "--set", "import.votes=each"], 'votes is for layout = "annotators"'),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = _run("import", *arguments, WINNOW_LAKE=str(tmp_path / "lake"), PREFECT_HOME=str(tmp_path / "prefect"))
    assert (done.returncode, done.stderr.startswith("error: ")) == (2, True), done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "lake").exists()
