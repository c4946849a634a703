"""Where bytes live: one small interface with create-only writes, over a local folder and over S3."""

from pathlib import Path

from storage.errors import LakeError
from storage.objects.local import LocalStore
from storage.objects.protocol import TEMPORARY, ObjectStore, Readable, Stored

__all__ = ["TEMPORARY", "ObjectStore", "Readable", "Stored", "open_store"]


def open_store(root: str) -> ObjectStore:
    """The store behind a lake's root; LakeError for a root that is a file, not supported, or a bucket out of reach."""
    if not root.strip():
        raise LakeError('lake "": the path is empty; give a folder such as ./lake, or s3://BUCKET/PREFIX')
    if root.startswith("s3://"):
        from storage.objects.s3 import open_s3

        return open_s3(root)
    if "://" in root:
        raise LakeError(f'lake "{root}": only folders and S3 are supported; give ./lake or s3://BUCKET/PREFIX')
    path = Path(root).expanduser().absolute()
    blocker = next((parent for parent in (path, *path.parents) if parent.exists()), path)
    if blocker.exists() and not blocker.is_dir():
        raise LakeError(f'lake "{root}": {blocker} is a file; give a folder')
    return LocalStore(path)
