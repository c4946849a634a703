"""Copying published versions between lakes: files first and checked on their way, the manifest last."""

from collections.abc import Iterator
from dataclasses import dataclass

from storage.errors import LakeError, RefError
from storage.lake import DatasetRef, FileEntry, Lake, Manifest
from storage.manifest import FILE_NAME
from storage.publish import CARD_NAME, publish
from storage.refs import parse_ref
from storage.stream import CheckedReader, sha256_of


@dataclass(frozen=True, slots=True)
class Copied:
    """One version: where it is now, how many of its files were sent, and inputs that the source does not have."""

    ref: DatasetRef
    files_sent: int
    is_new: bool
    missing_inputs: tuple[str, ...] = ()


def copy(source: Lake, ref: DatasetRef, target: Lake) -> Copied:
    """One version into another lake; a killed copy goes on where it was.

    LakeError when a file is not what the manifest says, or the target has other content under the same version.
    """
    manifest = source.manifest(ref)
    there = target.ref(ref.kind, ref.name, ref.version)
    if target.find(ref.kind, ref.name, ref.version) is not None:
        if target.manifest(there).files != manifest.files:
            raise LakeError(f"{ref} is in {target.root} already, with other content; remove that version there first")
        return Copied(there, 0, is_new=False)
    n_sent = sum(_send(source, ref, target, file) for file in manifest.files)
    card, text = (source.store.read(f"{ref.prefix}/{name}") for name in (CARD_NAME, FILE_NAME))
    publish(target.store, manifest, card, text)
    return Copied(there, n_sent, is_new=True)


def copy_with_inputs(source: Lake, ref: DatasetRef, target: Lake) -> Iterator[Copied]:
    """A version and everything it was made from, inputs first."""
    waiting, order = [ref], dict[str, tuple[DatasetRef, tuple[str, ...]]]()
    while waiting:
        current = waiting.pop()
        found, missing = _inputs(source, source.manifest(current))
        order.pop(str(current), None)
        order[str(current)] = (current, missing)
        waiting += found
    for current, missing in reversed(order.values()):
        done = copy(source, current, target)
        yield Copied(done.ref, done.files_sent, done.is_new, missing)


def _inputs(lake: Lake, manifest: Manifest) -> tuple[list[DatasetRef], tuple[str, ...]]:
    """The versions among a manifest's inputs that the lake has, and those it has not."""
    found, missing = [], []
    for text in manifest.inputs.values():
        try:
            kind, name, version = parse_ref(text)
        except RefError:
            continue  # the hash of a file or a model from outside
        ref = lake.find(kind, name, version) if version else None
        if ref is None:
            missing.append(text)
        else:
            found.append(ref)
    return found, tuple(missing)


def _send(source: Lake, ref: DatasetRef, target: Lake, file: FileEntry) -> bool:
    key = f"{ref.prefix}/{file.path}"
    if target.store.exists(key) and sha256_of(target.store, key) == file.sha256:
        return False
    with source.store.open(key) as stored:
        target.store.upload(key, CheckedReader(stored, file, str(ref)))
    return True
