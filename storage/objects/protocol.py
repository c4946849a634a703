"""What a store of objects can do, and which keys it takes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from pyarrow.fs import FileSystem

from storage.errors import LakeError

TEMPORARY = ".tmp"


@dataclass(frozen=True, slots=True)
class Stored:
    """An object, or with `upload_id` the parts of one whose upload never ended."""

    key: str
    size_bytes: int
    modified_at: datetime
    upload_id: str | None = None


class Readable(Protocol):
    """All that is asked of a source of bytes; fewer than `size` may come, none at its end only."""

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes."""
        ...


class ObjectStore(Protocol):
    """Keys are relative POSIX paths; whatever is written appears whole or not at all."""

    root: str

    def create(self, key: str, source: bytes | Readable) -> bool:
        """Write a new object; False when the key exists already (it is left as it is)."""
        ...

    def upload(self, key: str, source: Readable) -> None:
        """Write or replace an object (only for files that no manifest lists yet)."""
        ...

    def read(self, key: str) -> bytes:
        """All bytes of an object."""
        ...

    def read_all(self, keys: Sequence[str]) -> list[bytes | None]:
        """The bytes of many small objects, in order; None for those that are not there."""
        ...

    def open(self, key: str) -> BinaryIO:
        """A seekable reader."""
        ...

    def exists(self, key: str) -> bool:
        """Whether the key is there."""
        ...

    def list(self, prefix: str) -> Iterator[str]:
        """All keys below a folder, sorted."""
        ...

    def entries(self, prefix: str) -> Iterator[Stored]:
        """All objects below a folder, sorted by key."""
        ...

    def folders(self, prefix: str) -> Sequence[str]:
        """Names of the folders directly below a folder, sorted."""
        ...

    def unfinished(self) -> Iterator[Stored]:
        """What writes that never ended have left; no key shows it."""
        ...

    def delete(self, item: Stored) -> None:
        """Remove an object or an unfinished write; nothing happens when it is gone already."""
        ...

    def uri(self, key: str) -> str:
        """The address under which other tools find the object."""
        ...

    def local(self, key: str) -> Path | None:
        """The object's path on this machine; None for a store that is elsewhere."""
        ...

    def arrow(self, key: str) -> tuple[FileSystem, str]:
        """PyArrow's way to the object: its file system, and the object's path there."""
        ...


def key_parts(key: str) -> tuple[str, ...]:
    """The parts of a key; LakeError for one that leads out of the lake."""
    parts = PurePosixPath(key).parts
    if not parts or key.startswith("/") or ".." in parts or "\\" in key or "\0" in key:
        raise LakeError(f'key "{key}" leads out of the lake; use a relative path without ".."')
    return parts
