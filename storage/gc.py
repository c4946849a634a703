"""Removing what killed and abandoned runs left; a published version's files are never touched."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from storage.errors import LakeError
from storage.lake import DatasetRef, Lake
from storage.manifest import FILE_NAME
from storage.objects import Stored
from storage.publish import CARD_NAME, CLAIM, flag

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
        if item.modified_at < cutoff:
            yield from _remove(lake, [item], "unfinished write", is_dry_run)
    for ref in lake.versions():
        yield from _sweep(lake, ref, cutoff, is_dry_run)


def _sweep(lake: Lake, ref: DatasetRef, cutoff: datetime, is_dry_run: bool) -> Iterator[Leftover]:
    items = list(lake.store.entries(ref.prefix))
    if _is_published(ref, items):
        unlisted = _unlisted(lake, ref, items)
        old = [item for item in unlisted if item.modified_at < cutoff]
        yield from _remove(lake, old, "not in the manifest", is_dry_run)
    elif _is_abandoned(ref, items, cutoff):
        if is_dry_run:
            yield from _remove(lake, items, "never published", is_dry_run)
            return
        with flag(lake.store, f"{ref.prefix}/{CLAIM}"):
            # Looked at again, now that a writer would see the claim: see storage.publish.
            items = list(lake.store.entries(ref.prefix))
            if not _is_published(ref, items) and _is_abandoned(ref, items, cutoff):
                mine = [item for item in items if not _is_claim(ref, item) or item.modified_at < cutoff]
                yield from _remove(lake, mine, "never published", is_dry_run)


def _remove(lake: Lake, items: list[Stored], reason: str, is_dry_run: bool) -> Iterator[Leftover]:
    for item in items:
        if not is_dry_run:
            lake.store.delete(item)
        yield Leftover(item, reason)


def _is_published(ref: DatasetRef, items: list[Stored]) -> bool:
    return any(item.key == f"{ref.prefix}/{FILE_NAME}" for item in items)


def _is_abandoned(ref: DatasetRef, items: list[Stored], cutoff: datetime) -> bool:
    """Nobody has written anything for so long; claims are not writes, but young ones of others stand in the way."""
    return all(item.modified_at < cutoff for item in items if not _is_claim(ref, item))


def _is_claim(ref: DatasetRef, item: Stored) -> bool:
    return item.key.startswith(f"{ref.prefix}/{CLAIM}")


def _unlisted(lake: Lake, ref: DatasetRef, items: list[Stored]) -> list[Stored]:
    try:
        manifest = lake.manifest(ref)
    except LakeError:
        return []  # `winnow verify` names it; whoever repairs it needs the files
    listed = {f"{ref.prefix}/{path}" for path in (FILE_NAME, CARD_NAME, *(file.path for file in manifest.files))}
    return [item for item in items if item.key not in listed]
