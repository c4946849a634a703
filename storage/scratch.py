"""Work in progress that is no shard, such as a training's checkpoints: kept for the run that comes after a kill."""

import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from storage.cache import cache_folder
from storage.errors import LakeError
from storage.lake import DatasetRef, Lake
from storage.objects import TEMPORARY

WORK = "work"
LOCK = "lock"


@contextmanager
def scratch(lake: Lake, ref: DatasetRef) -> Iterator[Path]:
    """A local folder for the making of a version; the next run of the same version on this machine finds it again.

    It is removed when the block ends well, and kept when it raises. While another process has it, this one gets a
    folder of its own, which does not outlive the block.
    """
    folder = _folder(lake, ref)
    with _opened(folder) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with tempfile.TemporaryDirectory(prefix="winnow-") as other:
                yield Path(other)
            return
        yield folder
        shutil.rmtree(folder)


def _opened(folder: Path) -> TextIOWrapper:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / LOCK).open("w")
    except OSError as error:
        raise LakeError(f'"{folder}" cannot be written ({error.strerror}); check its permissions') from error


def is_busy(lake: Lake, key: str) -> bool:
    """Whether a process works in the scratch folder that an object of a local lake belongs to."""
    parts = key.split("/")
    path = lake.store.local("/".join((*parts[:3], LOCK))) if parts[:2] == [TEMPORARY, WORK] and len(parts) > 3 else None
    with suppress(OSError):
        if path is not None:
            with path.open("rb") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
    return False


def _folder(lake: Lake, ref: DatasetRef) -> Path:
    """In the lake where that is a folder, else in the user's cache."""
    name = f"{ref.kind}-{ref.name}-{ref.version}"
    inside = lake.store.local(f"{TEMPORARY}/{WORK}/{name}")
    if inside is not None:
        return inside
    return cache_folder() / WORK / f"{hashlib.sha256(lake.root.encode()).hexdigest()[:12]}-{name}"
