"""Checking a published version against its manifest, byte by byte."""

from collections.abc import Iterator
from dataclasses import dataclass

from storage.errors import LakeError
from storage.lake import DatasetRef, FileEntry, Lake
from storage.manifest import FILE_NAME
from storage.publish import CARD_NAME, is_flag
from storage.shards import decode
from storage.stream import CHUNK_BYTES, HashingReader


@dataclass(frozen=True, slots=True)
class Verdict:
    """One file: what is wrong with it, or None."""

    path: str
    size_bytes: int
    problem: str | None


def verify(lake: Lake, ref: DatasetRef) -> Iterator[Verdict]:
    """Every file of the manifest read again: present, as long as listed, with the listed sha256; shards also opened.

    Then what lies in the version's folder without being listed.
    """
    manifest = lake.manifest(ref)
    for file in manifest.files:
        yield Verdict(file.path, file.size_bytes, _problem(lake, ref, file))
    listed = {file.path for file in manifest.files} | {FILE_NAME, CARD_NAME}
    for item in lake.store.entries(ref.prefix):
        path = item.key.removeprefix(f"{ref.prefix}/")
        # Empty flags that killed runs left mean nothing any more; `winnow gc` removes them.
        if path not in listed and not (is_flag(path) and item.size_bytes == 0):
            yield Verdict(path, 0, "is not in the manifest")


def _problem(lake: Lake, ref: DatasetRef, file: FileEntry) -> str | None:
    key = f"{ref.prefix}/{file.path}"
    if not lake.store.exists(key):
        return "is missing"
    chunks = []
    with lake.store.open(key) as stored:
        reader = HashingReader(stored)
        while chunk := reader.read(CHUNK_BYTES):
            if file.table is not None:
                chunks.append(chunk)
    if reader.size_bytes != file.size_bytes:
        return f"has {reader.size_bytes} bytes, the manifest says {file.size_bytes}"
    if reader.sha256 != file.sha256:
        return "has another sha256 than the manifest says"
    if file.table is None:
        return None
    try:
        rows = decode(file.table, b"".join(chunks), file.path, "remove that version and run again").num_rows
    except LakeError as error:
        return str(error)
    return None if rows == file.rows else f"has {rows} rows, the manifest says {file.rows}"
