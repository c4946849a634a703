"""Where bytes live: a small interface with create-only writes, and its form for a local folder."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from pyarrow.fs import FileSystem, LocalFileSystem

from storage.errors import DiskFullError, LakeError

TEMPORARY = ".tmp"


class ObjectStore(Protocol):
    """Keys are relative POSIX paths; whatever is written appears whole or not at all."""

    root: str

    def create(self, key: str, data: bytes) -> bool:
        """Write a new object; False when the key exists already (it is left as it is)."""
        ...

    def upload(self, key: str, source: Path) -> None:
        """Write or replace an object from a local file (only for files that no manifest lists yet)."""
        ...

    def read(self, key: str) -> bytes:
        """All bytes of an object."""
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

    def uri(self, key: str) -> str:
        """The address under which other tools find the object."""
        ...

    def arrow(self, key: str) -> tuple[FileSystem, str]:
        """PyArrow's way to the object: its file system, and the object's path there."""
        ...


def open_store(root: str) -> ObjectStore:
    """The store behind a lake's root; raises LakeError for a root that is a file or not supported."""
    if not root.strip():
        raise LakeError('lake "": the path is empty; give a folder such as ./lake')
    if "://" in root:
        raise LakeError(f'lake "{root}": only local folders are supported; give a folder such as ./lake')
    path = Path(root).expanduser().absolute()
    blocker = next((parent for parent in (path, *path.parents) if parent.exists()), path)
    if blocker.exists() and not blocker.is_dir():
        raise LakeError(f'lake "{root}": {blocker} is a file; give a folder')
    return LocalStore(path)


class LocalStore:
    """A folder. New objects are written under a temporary name, synced and linked to their final name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = str(folder)

    def create(self, key: str, data: bytes) -> bool:
        """See ObjectStore."""
        target = self._path(key)
        with self._temporary() as temporary:
            _write_synced(temporary, data)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
        return True

    def upload(self, key: str, source: Path) -> None:
        """See ObjectStore."""
        target = self._path(key)
        with self._temporary() as temporary:
            shutil.copyfile(source, temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(target)

    def read(self, key: str) -> bytes:
        """See ObjectStore."""
        with self.open(key) as file:
            return file.read()

    def open(self, key: str) -> BinaryIO:
        """See ObjectStore."""
        path = self._path(key)
        try:
            return path.open("rb")
        except OSError as error:
            raise LakeError(f'"{path}" cannot be read ({error.strerror}); the lake is damaged there') from error

    def exists(self, key: str) -> bool:
        """See ObjectStore."""
        return self._path(key).is_file()

    def list(self, prefix: str) -> Iterator[str]:
        """See ObjectStore."""
        folder = self._path(prefix) if prefix else self.folder
        for path in sorted(folder.rglob("*")):
            relative = path.relative_to(self.folder)
            if path.is_file() and relative.parts[0] != TEMPORARY:
                yield relative.as_posix()

    def uri(self, key: str) -> str:
        """See ObjectStore."""
        return str(self._path(key))

    def arrow(self, key: str) -> tuple[FileSystem, str]:
        """See ObjectStore."""
        return LocalFileSystem(), str(self._path(key))

    def _path(self, key: str) -> Path:
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or ".." in parts or "\\" in key or "\0" in key:
            raise LakeError(f'key "{key}" leads out of the lake; use a relative path without ".."')
        path = self.folder.joinpath(*parts)
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise LakeError(f'key "{key}" is a link that leads out of the lake; remove it')
        return path

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        path = self.folder / TEMPORARY / uuid.uuid4().hex
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DiskFullError(
                    f'no space left for the lake in "{self.root}"; free some space and run again'
                ) from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise LakeError(f'the lake in "{self.root}" cannot be written; check its permissions') from error
            reason = f"{error.strerror}: {error.filename}"
            raise LakeError(f'the lake in "{self.root}" cannot be written ({reason}); check that path') from error
        finally:
            # On a disk that became read-only even this fails, and must not hide the error that says so.
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
