"""The moment a version appears, and how it keeps out of the way of `winnow gc`.

Writer: leaves a mark, then looks for a claim, then creates the manifest. gc: leaves a claim, then looks for a mark or
a manifest, then deletes. Whichever is second sees the other, so that no file of a published version is ever deleted.
Marks and claims count for an hour at least (storage.gc.MIN_AGE): nobody may sleep longer between looking and acting.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from storage.errors import LakeError
from storage.manifest import FILE_NAME, Manifest
from storage.objects import ObjectStore, Stored

CARD_NAME = "README.md"
MARK = ".publishing-"
CLAIM = ".gc-"


def publish(store: ObjectStore, manifest: Manifest, card: bytes, text: bytes) -> None:
    """The card, then the manifest, both create-only; LakeError when a file of the version is not there as listed."""
    prefix = manifest.prefix
    with flag(store, f"{prefix}/{MARK}"):
        store.create(f"{prefix}/{CARD_NAME}", card)
        sizes = {item.key: item.size_bytes for item in store.entries(prefix)}
        if any(key.startswith(f"{prefix}/{CLAIM}") for key in sizes):
            raise LakeError(
                f"{manifest.label}: `winnow gc` is removing leftovers of it; run again when it has ended (if it was "
                "killed, another `winnow gc` sets the version free after an hour)"
            )
        for file in manifest.files:
            if sizes.get(f"{prefix}/{file.path}") != file.size_bytes:
                raise LakeError(f"{manifest.label}: {file.path} was removed or replaced meanwhile; run again")
        store.create(f"{prefix}/{FILE_NAME}", text)


def is_flag(path: str) -> bool:
    """Whether a path inside a version is a mark or a claim."""
    return path.startswith((MARK, CLAIM))


@contextmanager
def flag(store: ObjectStore, prefix: str) -> Iterator[str]:
    """A small object of this process alone, there while the block runs."""
    key = f"{prefix}{uuid.uuid4().hex}"
    store.create(key, b"")
    try:
        yield key
    finally:
        store.delete(Stored(key, 0, datetime.now(UTC)))
