"""New files start a pipeline once, whatever the server still remembers."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tasks import watch
from tasks.settings_watch import WatchConfig


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the server was asked to start."""
    found: list[dict[str, Any]] = []

    def run_deployment(name: str, **options: Any) -> SimpleNamespace:
        found.append({"deployment": name, **options})
        return SimpleNamespace(id=len(found))

    monkeypatch.setattr(watch, "run_deployment", run_deployment)
    monkeypatch.setattr(watch, "_deployed_config", lambda deployment: {"generate": {"n": 4}})
    return found


@pytest.fixture
def incoming(tmp_path: Path) -> Path:
    """A folder with one file of prompts."""
    folder = tmp_path / "incoming"
    folder.mkdir()
    (folder / "First Batch.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "notes.txt").write_text("no prompts")
    return folder


def _look(incoming: Path, **values: Any) -> list[str]:
    config = WatchConfig.model_validate({"name": "in", "prefix": str(incoming), "settle_seconds": 0} | values)
    return watch.start_new.fn(config, str(incoming.parent / "lake"))


def test_a_file_starts_one_pipeline_with_the_deployments_other_parameters(
    incoming: Path, asked: list[dict[str, Any]]
) -> None:
    file = str(incoming / "First Batch.jsonl")
    assert _look(incoming) == [file]
    (one,) = asked
    assert one["deployment"] == "pipeline/default"
    assert one["parameters"]["config"] == {
        "name": "in-first-batch",
        "generate": {"n": 4},
        "ingest": {"source": file},
    }


def test_what_was_started_is_not_asked_for_again(incoming: Path, asked: list[dict[str, Any]]) -> None:
    _look(incoming)
    assert _look(incoming) == [] and len(asked) == 1
    (incoming / "second.jsonl").write_text('{"prompt": "b"}\n')
    assert _look(incoming) == [str(incoming / "second.jsonl")]
    assert [one["parameters"]["config"]["name"] for one in asked] == ["in-first-batch", "in-second"]


def test_a_changed_file_and_another_watch_start_again(incoming: Path, asked: list[dict[str, Any]]) -> None:
    _look(incoming)
    os.utime(incoming / "First Batch.jsonl", (1, 1))
    assert len(_look(incoming)) == 1
    assert len(_look(incoming, name="other")) == 1
    assert len({one["idempotency_key"] for one in asked}) == 2


def test_a_file_that_could_not_be_started_is_tried_again_under_the_same_key(
    incoming: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = watch.run_deployment

    def fail(name: str, **options: Any) -> None:
        ask(name, **options)
        raise ConnectionError("the server went away")

    monkeypatch.setattr(watch, "run_deployment", fail)
    with pytest.raises(ConnectionError):
        _look(incoming)
    monkeypatch.setattr(watch, "run_deployment", ask)
    assert len(_look(incoming)) == 1
    assert len({one["idempotency_key"] for one in asked}) == 1
