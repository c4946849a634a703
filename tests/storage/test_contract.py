"""What every store must do, over a local folder and over S3."""

import io
import os
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from storage.errors import LakeError
from storage.objects import ObjectStore, open_store
from storage.objects.s3_upload import PART_BYTES
from storage.schema import to_table
from storage.shards import encode
from tests.storage.rows import candidate

LARGE = os.urandom(PART_BYTES + 12345)


@pytest.fixture
def store(root: str) -> ObjectStore:
    return open_store(root)


def test_an_object_is_created_once_and_never_replaced(store: ObjectStore) -> None:
    assert store.create("a/b", b"first") is True
    assert store.create("a/b", b"second") is False
    assert store.create("a/b", io.BytesIO(b"third")) is False
    assert store.read("a/b") == b"first"


def test_a_large_object_is_created_once_and_never_replaced(store: ObjectStore) -> None:
    assert store.create("a/large", io.BytesIO(LARGE)) is True
    assert store.create("a/large", io.BytesIO(LARGE[::-1])) is False
    assert store.read("a/large") == LARGE
    assert list(store.unfinished()) == []


def test_of_many_writers_one_creates(store: ObjectStore) -> None:
    won: list[int] = []
    contents = [bytes([number]) * 1000 for number in range(8)]

    def write(number: int) -> None:
        if store.create("a/b", contents[number]):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("a/b") == contents[won[0]]


@pytest.mark.parametrize("contents", [[b"long first text", b"second"], [LARGE, LARGE[::-1]], [LARGE, b""]])
def test_an_upload_replaces_the_whole_object(store: ObjectStore, contents: list[bytes]) -> None:
    for content in contents:
        store.upload("models/x", io.BytesIO(content))
        assert store.read("models/x") == content


class Failing(io.BytesIO):
    """Ends in an error instead of an end."""

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        if not found:
            raise LakeError("the source is damaged")
        return found


@pytest.mark.parametrize("content", [b"short", LARGE])
def test_nothing_appears_when_the_source_fails_at_its_end(store: ObjectStore, content: bytes) -> None:
    for write in (store.upload, store.create):
        with pytest.raises(LakeError, match="the source is damaged"):
            write("a/b", Failing(content))
    assert list(store.list("")) == []
    assert list(store.unfinished()) == []


def test_a_reader_reads_seeks_and_ends(store: ObjectStore) -> None:
    store.create("a/large", io.BytesIO(LARGE))
    with store.open("a/large") as file:
        assert file.read(10) == LARGE[:10]
        assert file.seek(-10, io.SEEK_END) == len(LARGE) - 10
        assert file.read() == LARGE[-10:]
        assert file.read(1) == b""
        file.seek(12_000_000)
        assert file.read(9_000_000) == LARGE[12_000_000:21_000_000]
        assert file.tell() == len(LARGE)
        file.seek(0)
        assert file.read() == LARGE


def test_an_empty_object_is_an_object(store: ObjectStore) -> None:
    assert store.create("a/empty", b"") is True
    assert store.exists("a/empty")
    assert store.read("a/empty") == b""
    with store.open("a/empty") as file:
        assert file.read() == b""


def test_reading_what_is_not_there_is_one_line(store: ObjectStore) -> None:
    store.create("a/b", b"x")
    for key in ("a/c", "a"):
        assert not store.exists(key)
        for read in (store.read, store.open):
            with pytest.raises(LakeError, match=r"cannot be read .*the lake is damaged there"):
                read(key)
    assert store.read_all(["a/c", "a/b", "a", "b/c"]) == [None, b"x", None, None]


def test_keys_are_listed_in_order_below_their_folder_only(store: ObjectStore) -> None:
    keys = ["a-b/x", "a/b/1", "a/b/10", "a/b/2", "a/b-c", "ab/x"]
    for key in reversed(keys):
        store.create(key, b"x" * len(key))
    assert list(store.list("")) == sorted(keys)
    assert list(store.list("a")) == ["a/b-c", "a/b/1", "a/b/10", "a/b/2"]
    assert list(store.list("a/b")) == ["a/b/1", "a/b/10", "a/b/2"]
    assert list(store.list("none")) == []
    assert list(store.folders("")) == ["a", "a-b", "ab"]
    assert list(store.folders("a")) == ["b"]
    assert list(store.folders("none")) == []


def test_entries_have_sizes_and_times(store: ObjectStore) -> None:
    store.create("a/b", b"12345")
    (entry,) = store.entries("a")
    assert (entry.key, entry.size_bytes, entry.upload_id) == ("a/b", 5, None)
    assert abs(datetime.now(UTC) - entry.modified_at) < timedelta(minutes=5)


def test_more_keys_than_one_page_are_all_listed(store: ObjectStore) -> None:
    keys = [f"a/{number:04d}" for number in range(1205)]
    threads = [
        threading.Thread(target=lambda part=part: [store.create(key, b"") for key in part])
        for part in (keys[i::8] for i in range(8))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(store.list("a")) == keys
    assert store.read_all(keys[:40]) == [b""] * 40


def test_deleting_twice_is_deleting(store: ObjectStore) -> None:
    store.create("a/b/c", b"x")
    (entry,) = store.entries("a")
    store.delete(entry)
    store.delete(entry)
    assert list(store.list("")) == []
    assert list(store.folders("")) == []


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../x", "a\\b", "", "a\0b"])
def test_keys_that_lead_out_of_the_lake_are_refused(store: ObjectStore, key: str) -> None:
    for use in (store.read, store.open, store.exists, store.uri, store.arrow, store.local):
        with pytest.raises(LakeError, match="leads out of the lake"):
            use(key)
    for write in (store.create, store.upload):
        with pytest.raises(LakeError, match="leads out of the lake"):
            write(key, io.BytesIO(b"x"))


@pytest.mark.parametrize("key", ["a'; drop table x", "a b/ü", "a%2e%2e/x", "a+b&c=d?e#f", "[x]*{y}", "a/$(id)"])
def test_odd_keys_are_only_names(store: ObjectStore, key: str) -> None:
    assert store.create(key, b"x") is True
    assert list(store.list("")) == [key]
    assert store.read(key) == b"x"
    assert store.read_all([key]) == [b"x"]


def test_arrow_reads_what_the_store_wrote(store: ObjectStore) -> None:
    rows = to_table("candidates", [candidate(f"p{i}") for i in range(5)])
    store.create("a/b.parquet", encode("candidates", rows))
    filesystem, path = store.arrow("a/b.parquet")
    with filesystem.open_input_file(path) as file:
        assert pq.ParquetFile(file, pre_buffer=False).read(use_threads=False).equals(rows)


def test_addresses_lie_below_the_root(store: ObjectStore, root: str) -> None:
    assert store.root == root
    assert store.uri("a/b") == f"{root}/a/b"
    path = store.local("a/b")
    assert path == (None if root.startswith("s3://") else Path(root) / "a" / "b")
