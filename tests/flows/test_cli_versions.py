"""`winnow verify`, `copy` and `gc`, and looking at a lake in S3, as a user sees them."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.cli_versions import parse_age
from storage.lake import Lake
from tasks.errors import ConfigError
from tests.servers.buckets import new_lake, use_endpoint
from tests.storage.conftest import moto_url
from tests.storage.rows import publish_candidates, publish_model

__all__ = ["moto_url"]  # fixture

ROOT = Path(__file__).parents[2]


@pytest.fixture
def s3_root(moto_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    use_endpoint(monkeypatch, moto_url)
    return new_lake(tmp_path / "cache", monkeypatch)


def run(*arguments: str, code: int = 0) -> str:
    """Standard output of a command that ends with this exit code."""
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == code, done.output
    return done.stdout


def fails(*arguments: str) -> str:
    """The one line on standard error of a command that the user got wrong."""
    command = [sys.executable, "-m", "flows.cli", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"COLUMNS": "400"}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_a_version_goes_to_s3_and_back(s3_root: str, tmp_path: Path) -> None:
    local = str(tmp_path / "lake")
    publish_candidates(Lake.open(local))
    ref = publish_model(Lake.open(local), tmp_path / "run")
    copied = json.loads(run("copy", "models/demo", s3_root, "--with-inputs", "--json", "--lake", local))
    assert [version["ref"] for version in copied["copied"]] == ["candidates/demo@0123456789ab", str(ref)]
    assert copied["missing_inputs"] == []
    assert "all as the manifest says" in run("verify", "models/demo", "--lake", s3_root)
    assert "there already" in run("copy", "models/demo", s3_root, "--lake", local)
    back = str(tmp_path / "back")
    assert "copied" in run("copy", "models/demo", back, "--lake", s3_root)
    assert (Path(back) / ref.prefix / "model" / "weights.bin").read_text() == "weights"


def test_looking_at_a_lake_in_s3(s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_candidates(Lake.open(s3_root))
    monkeypatch.setenv("WINNOW_LAKE", s3_root)
    assert "candidates/demo@0123456789ab" in run("datasets")
    assert f"{s3_root}/candidates/demo/0123456789ab" in run("show", "candidates/demo").replace("\n", "")
    assert json.loads(run("query", "SELECT COUNT(*) AS n FROM candidates", "--json"))["rows"] == [[3]]
    assert "The rows were copied" in run("catalog", str(tmp_path / "x.duckdb"))


def test_gc_names_what_it_would_remove(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    ref = publish_candidates(lake)
    left = tmp_path / "lake" / ref.prefix / "left.bin"
    left.write_bytes(b"123")
    os.utime(left, (0, 0))
    assert "1 files, 3 bytes would be removed" in run("gc", "--dry-run", "--lake", lake.root)
    assert left.exists()
    removed = json.loads(run("gc", "--older-than", "12h", "--json", "--lake", lake.root))
    assert [item["key"] for item in removed["removed"]] == [f"{ref.prefix}/left.bin"]
    assert not left.exists()
    assert "0 files, 0 bytes removed" in run("gc", "--lake", lake.root)
    assert "all as the manifest says" in run("verify", "candidates/demo", "--lake", lake.root)


def test_a_difference_is_exit_code_1(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    ref = publish_candidates(lake)
    (tmp_path / "lake" / ref.prefix / lake.manifest(ref).files[0].path).write_bytes(b"x")
    assert "the manifest says" in run("verify", "candidates/demo", "--lake", lake.root, code=1)


@pytest.mark.parametrize(("text", "hours"), [("12h", 12), ("7d", 168), ("2w", 336)])
def test_ages(text: str, hours: int) -> None:
    assert parse_age(text) == timedelta(hours=hours)


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "1.5d", "7 d", "7m", "9999999d"])
def test_an_age_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write a number of hours, days or weeks"):
        parse_age(text)


def test_mistakes_are_one_line(s3_root: str, tmp_path: Path) -> None:
    assert "the bucket does not exist" in fails("datasets", "--lake", "s3://winnow-nowhere/lake")
    assert "is too short" in fails("gc", "--older-than", "0h", "--lake", str(tmp_path))
    assert "is not in the lake" in fails("copy", "models/none", str(tmp_path / "other"), "--lake", s3_root)
