"""Folders of remote versions on this machine: fetched whole, checked against the manifest, never half there."""

import errno
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from storage.errors import DiskFullError, LakeError
from storage.manifest import FileEntry, Manifest
from storage.objects import ObjectStore
from storage.stream import CHUNK_BYTES, CheckedReader


def cached_folder(store: ObjectStore, manifest: Manifest, prefix: str) -> Path:
    """The files below `prefix` of a version, in the user's cache folder."""
    files = [file for file in manifest.files if file.path.startswith(f"{prefix}/")]
    if not files:
        raise LakeError(f"{manifest.label} has no files under {prefix}; see `winnow show {manifest.label}`")
    # A version names what went in, two lakes may hold different results of it: the content is part of the name.
    content = hashlib.sha256("".join(f"{file.path}\n{file.sha256}\n" for file in files).encode()).hexdigest()
    target = cache_folder() / manifest.kind / manifest.name / f"{manifest.version}-{content[:16]}"
    if not _is_whole(target, files):
        _fetch(store, manifest, files, target)
    return target / prefix


def cache_folder() -> Path:
    """Where caches go on this system (the XDG rule)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "winnow"


def _is_whole(target: Path, files: list[FileEntry]) -> bool:
    paths = ((target / file.path, file.size_bytes) for file in files)
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def _fetch(store: ObjectStore, manifest: Manifest, files: list[FileEntry], target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as temporary:
            fetched = Path(temporary, target.name)
            for file in files:
                path = fetched / file.path
                path.parent.mkdir(parents=True, exist_ok=True)
                with store.open(f"{manifest.prefix}/{file.path}") as source, path.open("wb") as sink:
                    shutil.copyfileobj(CheckedReader(source, file, manifest.label), sink, CHUNK_BYTES)
            if target.exists() and not _is_whole(target, files):
                shutil.rmtree(target)  # somebody changed it
            if not target.exists():
                _rename(fetched, target, files)
    except OSError as error:
        kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else LakeError
        raise kind(
            f'cache "{target}" cannot be written ({error.strerror}); set XDG_CACHE_HOME to another folder'
        ) from error


def _rename(fetched: Path, target: Path, files: list[FileEntry]) -> None:
    try:
        fetched.rename(target)
    except OSError:
        if not _is_whole(target, files):  # otherwise another process was faster
            raise
