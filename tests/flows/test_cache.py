"""Runs whose result is in the lake, and clocks that go backwards."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from storage.lake import DatasetRef, Lake
from tasks import ingest
from tasks.cache import published
from tasks.plan import STAGES
from tasks.settings import IngestConfig, PipelineConfig
from tests.tasks.test_chain import config, lake

__all__ = ["config", "lake"]  # fixtures


def test_a_pipeline_whose_results_are_in_the_lake_calls_no_stage(
    lake: Lake, config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.pipeline import pipeline

    for stage in STAGES:
        monkeypatch.setitem(pipeline.fn.__globals__, stage, None)  # to call it would fail
    made = {one.label: one.created_at for one in lake.manifests()}
    found = pipeline.fn(config.chain(), lake.root)
    assert list(found) == list(STAGES)
    assert {str(ref) for ref in found.values()} <= set(made)
    assert {one.label: one.created_at for one in lake.manifests()} == made


def _ingest(root: Path, n_prompts: int) -> DatasetRef:
    settings = IngestConfig(name="clock", max_prompts=n_prompts, max_heldout=1)
    step = ingest.prepare(settings)
    return published(step, str(root)) or ingest.ingest.fn(step, str(root))


def _shards(root: Path, ref: DatasetRef) -> dict[str, str]:
    return {file.path: file.sha256 for file in Lake.open(str(root)).manifest(ref).files if file.table}


def test_a_clock_that_goes_back_changes_no_bytes_and_finds_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [datetime(2026, 3, 1, 12, tzinfo=UTC)]
    monkeypatch.setattr("storage.writer.now", lambda: now[0])
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    first = _ingest(right, 5)
    now[0] -= timedelta(days=1)
    behind = _ingest(wrong, 5)
    assert str(behind) == str(first)
    assert _shards(wrong, behind) == _shards(right, first)
    # The same run again is a hit, whatever the clock says, and stays as old as it was.
    assert _ingest(right, 5) == first
    assert [one.created_at for one in Lake.open(str(right)).manifests()] == [datetime(2026, 3, 1, 12, tzinfo=UTC)]
    # As documented: what is published by a clock that is behind is there, and is not the latest.
    other = _ingest(right, 6)
    found = Lake.open(str(right))
    assert str(other) != str(first) and found.find("prompts", "clock", other.version) == other
    assert str(found.resolve("prompts/clock")) == str(first)
