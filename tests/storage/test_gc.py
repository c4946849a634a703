"""gc removes what nobody needs, and never a file of a published version."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from storage import publish as publishing
from storage.errors import LakeError
from storage.gc import collect
from storage.lake import DatasetRef, Lake
from storage.manifest import FILE_NAME
from storage.schema import to_table
from storage.writer import Provenance, Shard
from tests.storage.rows import VERSION, candidate, problems, publish_candidates, publish_model, put

DAY = timedelta(days=1)


def _leftovers(lake: Lake, tmp_path: Path) -> tuple[DatasetRef, set[str]]:
    """A published version with unlisted files in its folder, and one that was never published."""
    ref = publish_model(lake, tmp_path / "run")
    garbage = {f"{ref.prefix}/model/old.bin", f"models/demo/{'f' * 12}/model/weights.bin"}
    garbage.add(f"models/demo/{'f' * 12}/{publishing.CLAIM}of-a-killed-gc")
    for key in garbage:
        put(lake, key, b"x")
    put(lake, "models/demo/notes.txt", b"x")
    put(lake, "notes.txt", b"x")
    return ref, garbage


def test_gc_removes_leftovers_and_nothing_else(lake: Lake, tmp_path: Path) -> None:
    ref, garbage = _leftovers(lake, tmp_path)
    before = set(lake.store.list(""))
    later = datetime.now(UTC) + 8 * DAY
    named = {found.item.key for found in collect(lake, 7 * DAY, later, is_dry_run=True)}
    assert set(lake.store.list("")) == before
    removed = {found.item.key for found in collect(lake, 7 * DAY, later, is_dry_run=False)}
    assert named == removed == garbage
    assert set(lake.store.list("")) == before - garbage
    assert problems(lake, ref) == {}
    assert list(collect(lake, 7 * DAY, later, is_dry_run=False)) == []


def test_gc_leaves_young_leftovers(lake: Lake, tmp_path: Path) -> None:
    _leftovers(lake, tmp_path)
    before = set(lake.store.list(""))
    (found,) = collect(lake, 7 * DAY, datetime.now(UTC) + 6 * DAY, is_dry_run=False)
    assert found.reason == "claim of a killed gc"  # it would keep a writer out
    assert set(lake.store.list("")) == before - {found.item.key}
    with pytest.raises(LakeError, match="is too short, running work would be lost"):
        list(collect(lake, timedelta(minutes=59), datetime.now(UTC), is_dry_run=False))


def test_gc_leaves_a_version_whose_manifest_is_damaged(lake: Lake, tmp_path: Path) -> None:
    ref = publish_model(lake, tmp_path / "run")
    put(lake, f"{ref.prefix}/{FILE_NAME}", b"{")
    assert list(collect(lake, DAY, datetime.now(UTC) + 2 * DAY, is_dry_run=False)) == []
    assert len(list(lake.store.list(ref.prefix))) == 4


def test_a_writer_does_not_publish_what_gc_is_removing(lake: Lake, tmp_path: Path) -> None:
    writer = lake.writer("candidates", "demo", VERSION)
    writer.write(Shard("candidates", "train", 0, 1), to_table("candidates", [candidate()]))
    provenance = Provenance("generate", {}, {}, {}, "winnow")
    with (
        publishing.flag(lake.store, f"{writer.ref.prefix}/{publishing.CLAIM}"),
        pytest.raises(LakeError, match="`winnow gc` is removing leftovers of it"),
    ):
        writer.commit(provenance)
    later = datetime.now(UTC) + 2 * DAY
    assert len(list(collect(lake, DAY, later, is_dry_run=False))) == 2  # the shard and the card
    with pytest.raises(LakeError, match="was removed or replaced meanwhile; run again"):
        writer.commit(provenance)
    assert lake.manifests() == []


def test_gc_backs_off_when_a_writer_comes_back(lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between gc's first look and its claim, the run that was thought dead publishes."""
    writer = lake.writer("candidates", "demo", VERSION)
    writer.write(Shard("candidates", "train", 0, 1), to_table("candidates", [candidate()]))
    create = lake.store.create

    def create_after_the_writer(key: str, data: bytes) -> bool:
        if publishing.CLAIM in key:
            monkeypatch.undo()
            writer.commit(Provenance("generate", {}, {}, {}, "winnow"))
        return create(key, data)

    monkeypatch.setattr(lake.store, "create", create_after_the_writer)
    assert list(collect(lake, DAY, datetime.now(UTC) + 2 * DAY, is_dry_run=False)) == []
    assert problems(lake, lake.resolve("candidates/demo")) == {}


def test_gc_removes_temporary_files_of_killed_writers(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    publish_candidates(lake)
    old = tmp_path / ".tmp" / "0123" / "spill"
    old.parent.mkdir(parents=True)
    for path in (old, tmp_path / ".tmp" / "young"):
        path.write_bytes(b"123")
    os.utime(old, (0, 0))
    found = list(collect(lake, DAY, datetime.now(UTC), is_dry_run=False))
    assert [(leftover.item.key, leftover.item.size_bytes) for leftover in found] == [(".tmp/0123/spill", 3)]
    assert [path.name for path in (tmp_path / ".tmp").iterdir()] == ["young"]


def test_gc_aborts_old_uploads(s3_root: str) -> None:
    lake = Lake.open(s3_root)
    place = {"Bucket": lake.store.bucket, "Key": "lake/models/demo/x"}  # type: ignore[attr-defined]
    lake.store._client.create_multipart_upload(**place)  # type: ignore[attr-defined]
    (found,) = collect(lake, DAY, datetime.now(UTC) + 2 * DAY, is_dry_run=False)
    assert (found.item.key, found.reason) == ("models/demo/x", "unfinished write")
    assert list(lake.store.unfinished()) == []
    lake.store.delete(found.item)  # gone already
