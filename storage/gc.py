"""Removing what killed and abandoned runs left; a published version's files are never touched."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from storage.errors import LakeError
from storage.lake import DatasetRef, Lake
from storage.manifest import FILE_NAME
from storage.objects import Stored
from storage.publish import CARD_NAME, CLAIM, flag
from storage.scratch import is_busy

# A run writes its shards far more often than this; younger leftovers may be somebody's work.
MIN_AGE = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something to remove, and why."""

    item: Stored
    reason: str


def collect(lake: Lake, older_than: timedelta, now: datetime, is_dry_run: bool) -> Iterator[Leftover]:
    """Remove (or only name) what is older: unfinished writes, versions never published, files no manifest lists."""
    if older_than < MIN_AGE:
        raise LakeError(f"gc: {older_than} is too short, running work would be lost; give an hour (1h) or more")
    cutoff = now - older_than
    for item in lake.store.unfinished():
        if item.modified_at < cutoff and not is_busy(lake, item.key):
            yield from _remove(lake, [item], "unfinished write", is_dry_run)
    for ref in lake.versions():
        yield from _free(lake, ref, now - MIN_AGE, is_dry_run)
        yield from _sweep(lake, ref, cutoff, is_dry_run)


def _free(lake: Lake, ref: DatasetRef, cutoff: datetime, is_dry_run: bool) -> Iterator[Leftover]:
    """Claims of collectors that were killed keep writers out: no collector is busy with one version for an hour."""
    claims = [item for item in lake.store.entries(ref.prefix) if _is_claim(ref, item) and item.modified_at < cutoff]
    return _remove(lake, claims, "claim of a killed gc", is_dry_run)


def _sweep(lake: Lake, ref: DatasetRef, cutoff: datetime, is_dry_run: bool) -> Iterator[Leftover]:
    items = _writes(lake, ref)
    if _is_published(ref, items):
        old = [item for item in _unlisted(lake, ref, items) if item.modified_at < cutoff]
        yield from _remove(lake, old, "not in the manifest", is_dry_run)
    elif is_dry_run:
        yield from _remove(lake, items if _is_abandoned(items, cutoff) else [], "never published", is_dry_run)
    elif _is_abandoned(items, cutoff):
        with flag(lake.store, f"{ref.prefix}/{CLAIM}"):
            # Looked at again, now that a writer would see the claim: see storage.publish.
            items = _writes(lake, ref)
            if not _is_published(ref, items) and _is_abandoned(items, cutoff):
                yield from _remove(lake, items, "never published", is_dry_run)


def _remove(lake: Lake, items: list[Stored], reason: str, is_dry_run: bool) -> Iterator[Leftover]:
    for item in items:
        if not is_dry_run:
            lake.store.delete(item)
        yield Leftover(item, reason)


def _is_published(ref: DatasetRef, items: list[Stored]) -> bool:
    return any(item.key == f"{ref.prefix}/{FILE_NAME}" for item in items)


def _is_abandoned(items: list[Stored], cutoff: datetime) -> bool:
    return bool(items) and all(item.modified_at < cutoff for item in items)


def _writes(lake: Lake, ref: DatasetRef) -> list[Stored]:
    """What writers have left in a version's folder."""
    return [item for item in lake.store.entries(ref.prefix) if not _is_claim(ref, item)]


def _is_claim(ref: DatasetRef, item: Stored) -> bool:
    return item.key.startswith(f"{ref.prefix}/{CLAIM}")


def _unlisted(lake: Lake, ref: DatasetRef, items: list[Stored]) -> list[Stored]:
    try:
        manifest = lake.manifest(ref)
    except LakeError:
        return []  # `winnow verify` names it; whoever repairs it needs the files
    listed = {f"{ref.prefix}/{path}" for path in (FILE_NAME, CARD_NAME, *(file.path for file in manifest.files))}
    return [item for item in items if item.key not in listed]
