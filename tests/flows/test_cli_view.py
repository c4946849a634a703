import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flows.cli import main
from storage.lake import Lake
from tests.storage.rows import candidate, dialogue, publish

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    lake = Lake.open(str(tmp_path_factory.mktemp("view") / "lake"))
    publish(lake, "preferences", [dialogue("p0"), dialogue("p1", "clerk")])
    publish(lake, "candidates", [candidate("p0", i, float(i)) for i in range(3)])
    return lake


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(lake: Lake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line, in this process."""
    monkeypatch.setenv("WINNOW_LAKE", lake.root)
    monkeypatch.setenv("COLUMNS", "200")

    def done(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["winnow", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert isinstance(stop.value.code, int)
        return Done(stop.value.code, *capsys.readouterr())

    return done


def test_a_view_is_written_and_counted(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "pairs.parquet"
    done = run("view", "preferences/demo", "trl", "--out", str(out), "--group", "clerk")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{out}: 1 rows of preferences/demo@0123456789ab as trl\n"
    assert pq.read_table(out)["prompt_id"].to_pylist() == ["p1"]


def test_a_view_without_a_file_shows_its_first_rows(run: Run) -> None:
    shown = run("view", "preferences/demo", "llama_factory").stdout
    assert shown.startswith("preferences/demo@0123456789ab as llama_factory")
    assert '{"from": "gpt", "value": "6"}' in shown


@pytest.mark.parametrize("command", [["view", "preferences/demo", "trl_kto"], ["query", "SELECT 1 AS a"]])
def test_json_is_one_object_with_and_without_a_file(run: Run, tmp_path: Path, command: list[str]) -> None:
    plain = run(*command, "--json")
    out = tmp_path / "rows.json"
    written = run(*command, "--json", "--out", str(out))
    assert (plain.stderr, written.stderr) == ("", "")
    assert isinstance(json.loads(plain.stdout), dict)
    assert json.loads(written.stdout)["out"] == str(out)
    assert json.loads(out.read_text())


def test_every_format_of_a_query_says_the_same(run: Run, tmp_path: Path) -> None:
    sql = "SELECT candidate_index AS i, score FROM candidates ORDER BY 1"
    columns, rows = ["i", "score"], [[0, 0.0], [1, 1.0], [2, 2.0]]
    assert json.loads(run("query", sql, "--json").stdout) == {"columns": columns, "rows": rows}
    assert run("query", sql, "--format", "json").stdout == run("query", sql, "--json").stdout
    assert run("query", sql).stdout == run("query", sql, "--format", "table").stdout
    csv = run("query", sql, "--format", "csv").stdout
    assert csv == '"i","score"\n0,0\n1,1\n2,2\n'
    for suffix in ("csv", "json", "parquet"):
        done = run("query", sql, "--out", str(tmp_path / f"rows.{suffix}"))
        assert done.stdout == f"{tmp_path}/rows.{suffix}: 3 rows, 2 columns\n"
    assert (tmp_path / "rows.csv").read_text() == csv
    assert json.loads((tmp_path / "rows.json").read_text()) == {"columns": columns, "rows": rows}
    assert pq.read_table(tmp_path / "rows.parquet")["score"].to_pylist() == [0.0, 1.0, 2.0]


def test_what_json_cannot_hold_is_text(run: Run) -> None:
    sql = "SELECT 'nan'::DOUBLE AS a, ['-inf'::DOUBLE] AS b, MAP {DATE '2026-01-02': 1} AS c"
    done = run("query", sql, "--json")
    assert json.loads(done.stdout, parse_constant=pytest.fail)["rows"] == [["NaN", ["-Infinity"], {"2026-01-02": 1}]]


def test_a_reader_that_stops_early_ends_the_query_quietly(lake: Lake) -> None:
    command = f'{sys.executable} -m flows.cli query "SELECT * FROM range(3000000)" --format csv | head -n 2'
    environment = os.environ | {"WINNOW_LAKE": lake.root}
    done = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ('"range"\n0\n', "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["view", "preferences/demo", "csv"], 'format "csv" is unknown; formats: trl, trl_kto, prompts, ultrafeedback'),
        (["view", "preferences/demo", "text"], "cannot carry 2 rows"),
        (["view", "preferences/none", "trl"], "is not in the lake"),
        (["view", "candidates/demo", "trl"], "has no table preferences"),
        (["view", "preferences/demo", "trl", "--out", "x.csv"], "files that end in .parquet, .jsonl, .json"),
        (["view", "preferences/demo", "trl", "--split", "test"], 'no split "test"; its splits: train'),
        (["view", "preferences/demo", "trl", "--group", "x'; --"], "its groups: child, clerk"),
        (["query", "SELECT 1", "--format", "parquet"], "add --out FILE.parquet"),
        (["query", "SELECT 1", "--format", "csv", "--json"], "exclude each other"),
        (["query", "SELECT 1", "--format", "csv", "--out", "x.json"], "does not go with"),
        (["query", "SELECT 1", "--format", "xml"], "'xml' is not one of"),
        (["query", "SELECT 1", "--out", "x.txt"], "give a file that ends in .json, .csv, .parquet"),
        (["query", "SELEC 1", "--format", "csv"], "syntax error"),
        (["query", "SELECT 1", "--out", "nowhere/x.csv"], "give a file in a writable folder"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(run: Run, arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
