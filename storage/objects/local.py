"""Objects in a local folder."""

import errno
import io
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from pyarrow.fs import FileSystem, LocalFileSystem

from storage.errors import DiskFullError, LakeError
from storage.objects.protocol import TEMPORARY, Readable, Stored, key_parts

CHUNK_BYTES = 1 << 20


class LocalStore:
    """A folder. New objects are written under a temporary name, synced and linked to their final name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = str(folder)

    def create(self, key: str, source: bytes | Readable) -> bool:
        """See ObjectStore."""
        target = self._path(key)
        with self._temporary() as temporary:
            _write_synced(temporary, io.BytesIO(source) if isinstance(source, bytes) else source)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
        return True

    def upload(self, key: str, source: Readable) -> None:
        """See ObjectStore."""
        target = self._path(key)
        with self._temporary() as temporary:
            _write_synced(temporary, source)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(target)

    def read(self, key: str) -> bytes:
        """See ObjectStore."""
        with self.open(key) as file:
            return file.read()

    def read_all(self, keys: Sequence[str]) -> list[bytes | None]:
        """See ObjectStore."""
        return [self._read_if_there(key) for key in keys]

    def open(self, key: str) -> BinaryIO:
        """See ObjectStore."""
        path = self._path(key)
        try:
            return path.open("rb")
        except OSError as error:
            raise _unreadable(path, error) from error

    def exists(self, key: str) -> bool:
        """See ObjectStore."""
        return self._path(key).is_file()

    def list(self, prefix: str) -> Iterator[str]:
        """See ObjectStore."""
        return (item.key for item in self.entries(prefix))

    def entries(self, prefix: str) -> Iterator[Stored]:
        """See ObjectStore."""
        folder = self._path(prefix) if prefix else self.folder
        found = (item for item in self._files(folder) if not item.key.startswith(f"{TEMPORARY}/"))
        yield from sorted(found, key=lambda item: item.key)

    def folders(self, prefix: str) -> Sequence[str]:
        """See ObjectStore."""
        try:
            with os.scandir(self._path(prefix) if prefix else self.folder) as found:
                return sorted(entry.name for entry in found if entry.is_dir() and entry.name != TEMPORARY)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def unfinished(self) -> Iterator[Stored]:
        """See ObjectStore."""
        return self._files(self.folder / TEMPORARY)

    def delete(self, item: Stored) -> None:
        """See ObjectStore."""
        path = self._path(item.key)
        path.unlink(missing_ok=True)
        with suppress(OSError):  # the first parent that holds something else ends it
            for parent in path.parents[: len(key_parts(item.key)) - 1]:
                parent.rmdir()

    def uri(self, key: str) -> str:
        """See ObjectStore. Only a name: who opens it by `local` or `open` has links checked."""
        return "/".join((self.root.rstrip("/"), *key_parts(key)))

    def local(self, key: str) -> Path | None:
        """See ObjectStore."""
        return self._path(key)

    def arrow(self, key: str) -> tuple[FileSystem, str]:
        """See ObjectStore."""
        return LocalFileSystem(), str(self._path(key))

    @cached_property
    def _resolved(self) -> str:
        return os.path.realpath(self.folder)

    def _path(self, key: str) -> Path:
        path = self.folder.joinpath(*key_parts(key))
        if not os.path.realpath(path).startswith(f"{self._resolved.rstrip(os.sep)}{os.sep}"):
            raise LakeError(f'key "{key}" is a link that leads out of the lake; remove it')
        return path

    def _read_if_there(self, key: str) -> bytes | None:
        path = self._path(key)
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise _unreadable(path, error) from error

    def _files(self, folder: Path) -> Iterator[Stored]:
        for parent, _, names in os.walk(folder):
            for name in names:
                path = Path(parent, name)
                try:
                    state = path.stat()
                except FileNotFoundError:  # another process was faster
                    continue
                modified = datetime.fromtimestamp(state.st_mtime, UTC)
                yield Stored(path.relative_to(self.folder).as_posix(), state.st_size, modified)

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


def _unreadable(path: Path, error: OSError) -> LakeError:
    return LakeError(f'"{path}" cannot be read ({error.strerror}); the lake is damaged there')


def _write_synced(path: Path, source: Readable) -> None:
    with path.open("wb") as file:
        shutil.copyfileobj(source, file, CHUNK_BYTES)
        file.flush()
        os.fsync(file.fileno())
