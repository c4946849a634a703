import errno
import io
import os
import shutil
from pathlib import Path

import pytest

from storage.errors import DiskFullError, LakeError
from storage.lake import Lake
from storage.objects import open_store


def test_opening_a_lake_creates_nothing(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "new" / "lake"))
    assert lake.manifests() == []
    assert list(tmp_path.iterdir()) == []


def test_links_that_lead_out_of_the_lake_are_refused(tmp_path: Path) -> None:
    (tmp_path / "lake").mkdir()
    (tmp_path / "lake" / "prompts").symlink_to(tmp_path)
    with pytest.raises(LakeError, match="link that leads out"):
        open_store(str(tmp_path / "lake")).create("prompts/x", b"x")


def test_a_lake_path_that_is_or_passes_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in ("file", "file/lake"):
        with pytest.raises(LakeError, match="is a file; give a folder"):
            Lake.open(str(tmp_path / path))


def test_another_kind_of_store_is_refused_in_one_line() -> None:
    with pytest.raises(LakeError, match="only folders and S3 are supported"):
        Lake.open("gs://bucket/lake")


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = open_store(str(tmp_path))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="no space left for the lake"):
        store.create("a/b", b"x")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a Linux machine with /dev/full semantics")
def test_a_file_size_limit_is_reported_like_a_full_disk(tmp_path: Path) -> None:
    import resource
    import signal

    store = open_store(str(tmp_path))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    try:
        with pytest.raises(DiskFullError):
            store.create("a/b", b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert not store.exists("a/b")


def test_a_full_disk_during_an_upload_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object, target: io.BufferedWriter, __: int) -> None:
        target.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(DiskFullError, match="no space left for the lake"):
        open_store(str(tmp_path / "lake")).upload("models/x", io.BytesIO(b"x"))
    assert [path for path in (tmp_path / "lake").rglob("*") if path.is_file()] == []


def test_a_disk_that_became_read_only_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    store = open_store(str(tmp_path))
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(LakeError, match="cannot be written; check its permissions"):
        store.create("a/b", b"x")


def test_a_file_where_a_folder_must_be_is_named(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "lake"))
    store.create("prompts", b"x")
    with pytest.raises(LakeError, match="cannot be written .*lake/prompts") as caught:
        store.create("prompts/a/b", b"x")
    assert "\n" not in str(caught.value)


def test_an_empty_lake_path_does_not_mean_the_current_folder() -> None:
    with pytest.raises(LakeError, match="the path is empty"):
        open_store("")
