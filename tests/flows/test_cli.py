import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
import typer
from typer.testing import CliRunner

from flows.cli import app
from runtime.starter import path as starter
from storage.lake import Lake
from tests.tasks.test_chain import config, lake
from tests.tasks.test_export import without_bytes

__all__ = ["config", "lake"]  # fixtures

ROOT = Path(__file__).parents[2]
STAGES = ("ingest", "generate", "score", "assemble", "finetune", "evaluate", "export")
COMMANDS = (
    "demo",
    "run",
    *STAGES,
    "compare",
    "calibrate",
    "adapt",
    "align",
    "iterate",
    "import",
    "plan",
    "query",
    "view",
    "report",
    "push",
    "catalog",
    "datasets",
    "show",
    "verify",
    "copy",
    "gc",
    "runs",
    "deploy",
    "serve",
    "chat",
    "plan-edge",
    "probe",
    "starter build",
    "starter check",
)


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *arguments]
    # A configured server that does not exist: nothing here may get as far as needing one.
    variables = os.environ | {"PREFECT_API_URL": "", "COLUMNS": "200"} | environment
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=100)


@pytest.mark.slow
def test_a_vocabulary_that_a_format_cannot_hold_is_one_line(tmp_path: Path) -> None:
    folder = without_bytes(starter("policy"), tmp_path)
    for format in ("gguf", "powerinfer"):
        done = _run("export", str(folder), "--format", format, "--lake", str(tmp_path / "lake"))
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "the vocabulary has no byte tokens" in done.stderr.splitlines()[-1]


def test_every_command_has_help_and_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert isinstance(app, typer.Typer)
    listed = CliRunner().invoke(app, ["--help"]).stdout
    for command in COMMANDS:
        result = CliRunner().invoke(app, [*command.split(), "--help"])
        assert result.exit_code == 0, command
        assert "Usage" in result.stdout
        assert f"winnow {command}" in readme, command
        assert command.split()[0] in listed


@pytest.mark.parametrize("arguments", [["--help"], ["datasets"], ["query", "SELECT 1"]])
def test_looking_at_the_lake_needs_neither_torch_nor_prefect(arguments: list[str], tmp_path: Path) -> None:
    script = (
        "import sys; sys.argv = ['winnow', *sys.argv[1:]]\n"
        "from flows.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        "heavy = {'torch', 'transformers', 'prefect', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = os.environ | {"WINNOW_LAKE": str(tmp_path / "lake")}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command", [["datasets"], ["query", "SELECT COUNT(*) AS n FROM candidates"], ["show", "prompts/tiny"]]
)
def test_json_is_one_object_on_standard_output(lake: Lake, command: list[str]) -> None:
    done = _run(*command, "--json", "--lake", lake.root)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)
    assert done.stderr == ""


def test_a_catalog_opens_in_duckdb_alone(lake: Lake, tmp_path: Path) -> None:
    file = tmp_path / "lake.duckdb"
    assert "preferences" in _run("catalog", str(file), "--lake", lake.root).stdout
    with duckdb.connect(str(file), read_only=True) as connection:
        rows = connection.execute("SELECT DISTINCT dataset FROM preferences").fetchall()
    assert rows == [("tiny",)]
    refused = _run("catalog", str(tmp_path / "missing" / "lake.duckdb"), "--lake", lake.root)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "give a file in a writable folder" in refused.stderr


def test_verify_tells_whole_from_damaged(lake: Lake, tmp_path: Path) -> None:
    copy = tmp_path / "lake"
    shutil.copytree(lake.root, copy)
    whole = _run("verify", "preferences/tiny", "--lake", str(copy))
    assert whole.returncode == 0 and "all as the manifest says" in whole.stdout
    shard = next(copy.glob("preferences/tiny/*/preferences/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    damaged = _run("verify", "preferences/tiny", "--lake", str(copy), "--json")
    assert damaged.returncode == 1
    assert [f["problem"] is None for f in json.loads(damaged.stdout)["files"]].count(False) == 1


def test_tables_show_the_lake(lake: Lake) -> None:
    assert "preferences/tiny@" in _run("datasets", "--lake", lake.root).stdout
    shown = _run("query", 'SELECT "group", COUNT(*) FROM preferences GROUP BY 1', "--lake", lake.root).stdout
    assert shown.splitlines()[0].split() == ["group", "count_star()"]
    assert "first rows of preferences" in _run("show", "preferences/tiny", "--lake", lake.root).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "gone.toml"], 'config file "gone.toml" does not exist'),
        (["plan", "gone.toml"], "does not exist"),
        (["generate", "--set", "generate.n=0"], "generate.n = 0"),
        (["generate", "--set", "generate.colour=red"], 'unknown key "generate.colour"'),
        (["show", "prompts/none"], "is not in the lake"),
        (["show", "nonsense"], "write kind/name"),
        (["query", "SELEC 1"], "syntax error"),
        (["query"], "Missing argument"),
        (["nothing"], "No such command"),
        (["ingest", "gone.jsonl"], "does not exist"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2_and_leaves_the_lake_alone(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    lake = tmp_path / "lake"
    done = _run(*arguments, WINNOW_LAKE=str(lake), PREFECT_HOME=str(tmp_path / "prefect"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not lake.exists()


def test_a_lake_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "lake").write_text("x")
    done = _run("datasets", "--lake", str(tmp_path / "lake"))
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    assert "is a file; give a folder" in done.stderr


def test_a_configured_server_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    environment = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_HOME": str(tmp_path)}
    done = _run("ingest", "starter", "--lake", str(tmp_path / "lake"), **environment)
    assert done.returncode == 2, done.stderr
    assert "does not answer" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
