"""`winnow report` from the command line, and the pictures that stages show in Prefect."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage.lake import DatasetRef, Lake
from storage.schema import to_table
from storage.writer import Provenance, Shard
from tests.storage.rows import candidate, preference, prompt

pytest.importorskip("matplotlib", reason="reports need the extra `report`")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pairs(tmp_path: Path) -> DatasetRef:
    """A version of pairs in a lake of its own."""
    writer = Lake.open(str(tmp_path / "lake")).writer("preferences", "demo", "c" * 12)
    rows = [preference(f"p{i}", "ab"[i % 2], score_margin=float(i)) for i in range(6)]
    writer.write(Shard("preferences", "train", 0, 1), to_table("preferences", rows))
    return writer.commit(Provenance("assemble", {}, {}, {}, "winnow assemble"))


def _run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *arguments, "--lake", str(folder / "lake")]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "PREFECT_API_URL": ""} | environment
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=100)


def test_a_report_is_written_here_under_the_name_of_its_version(tmp_path: Path, pairs: DatasetRef) -> None:
    done = _run(tmp_path, "report", "preferences/demo")
    assert (done.returncode, done.stderr) == (0, "")
    page = tmp_path / f"preferences-demo-{'c' * 12}.html"
    assert f"{page.name}: {pairs}, 1 pictures, {page.stat().st_size} bytes" in done.stdout
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_an_older_report_is_replaced_whole_and_json_says_what_is_in_it(tmp_path: Path, pairs: DatasetRef) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    done = _run(tmp_path, "report", str(pairs), "--out", str(page), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert (said["ref"], said["sections"], said["pictures"]) == (str(pairs), ["Pairs"], ["margins"])
    assert said["size_bytes"] == page.stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lake", "page.html"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "preferences/none"], "is not in the lake"),
        (["report", "preferences/demo", "--out", "missing/page.html"], "cannot be written"),
        (["report", "preferences/demo", "--out", "lake"], "cannot be written"),
        (["push", "models/demo", "me/x"], "is not in the lake"),
        (["push", "preferences/demo"], "Missing argument"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, tmp_path: Path, pairs: DatasetRef) -> None:
    done = _run(tmp_path, *arguments)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["lake"]


def test_a_report_needs_neither_torch_nor_prefect(tmp_path: Path, pairs: DatasetRef) -> None:
    script = (
        "import sys; sys.argv = ['winnow', 'report', 'preferences/demo']\n"
        "from flows.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        "heavy = {'torch', 'transformers', 'prefect', 'datasets', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = os.environ | {"WINNOW_LAKE": str(tmp_path / "lake"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


def test_a_run_shows_the_picture_of_its_result_and_plain_calls_show_none(
    tmp_path: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import Artifact

    from tasks import pictures

    lake = Lake.open(str(tmp_path / "lake"))
    prompts = lake.writer("prompts", "shown", "a" * 12)
    prompts.write(Shard("prompts", "train", 0, 1), to_table("prompts", [prompt()]))
    inputs = {"prompts": str(prompts.commit(Provenance("ingest", {}, {}, {}, "winnow")))}
    writer = lake.writer("candidates", "shown", "b" * 12)
    rows = [candidate(index=i, score=float(i)) for i in range(9)]
    writer.write(Shard("candidates", "train", 0, 1), to_table("candidates", rows))
    ref = writer.commit(Provenance("score", {}, inputs, {}, "winnow"))

    @flow(name="pictures")
    def show() -> None:
        pictures.show_picture(lake, ref)

    def shown() -> list[Artifact]:
        with get_client(sync_client=True) as client:
            return [each for each in client.read_artifacts(limit=200) if each.key == "candidates-shown-scores"]

    pictures.show_picture(lake, ref)
    assert shown() == []
    show()
    (artifact,) = shown()
    assert str(ref) in str(artifact.description)
    data = str(artifact.data).removeprefix("data:image/png;base64,")
    assert base64.b64decode(data).startswith(b"\x89PNG")
    assert len(data) < 150_000
    monkeypatch.setattr("storage.report.style.find_spec", lambda name: None)
    show()
    assert [each.id for each in shown()] == [artifact.id]
