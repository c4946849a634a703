"""Bytes on their way from one place to another, counted and hashed."""

import hashlib

from storage.errors import LakeError
from storage.manifest import FileEntry
from storage.objects import ObjectStore, Readable

CHUNK_BYTES = 1 << 20


def damaged(label: str, file: FileEntry) -> LakeError:
    """For a file of the version `label` that is not what the manifest lists."""
    fix = "remove that version and run again"
    return LakeError(f"{label}: {file.path} is damaged (its sha256 is not the manifest's); {fix}")


class HashingReader:
    """A reader that knows the sha256 and the length of what went through it."""

    def __init__(self, source: Readable) -> None:
        self._source, self._digest, self.size_bytes = source, hashlib.sha256(), 0

    @property
    def sha256(self) -> str:
        """Of everything read so far."""
        return self._digest.hexdigest()

    def read(self, size: int = -1, /) -> bytes:
        """As of the source."""
        data = self._source.read(size)
        self._digest.update(data)
        self.size_bytes += len(data)
        return data


class CheckedReader(HashingReader):
    """A reader whose end is a LakeError unless everything was as the manifest says: what it feeds never appears."""

    def __init__(self, source: Readable, file: FileEntry, label: str) -> None:
        super().__init__(source)
        self._file, self._label = file, label

    def read(self, size: int = -1, /) -> bytes:
        """As of the source."""
        data = super().read(size)
        is_end = size != 0 and (size < 0 or not data)
        if is_end and (self.sha256, self.size_bytes) != (self._file.sha256, self._file.size_bytes):
            raise damaged(self._label, self._file)
        return data


def sha256_of(store: ObjectStore, key: str) -> str:
    """The sha256 of an object, read in pieces."""
    with store.open(key) as stored:
        reader = HashingReader(stored)
        while reader.read(CHUNK_BYTES):
            pass
    return reader.sha256
