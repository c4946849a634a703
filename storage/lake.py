"""The lake: immutable versions under `<root>/<kind>/<name>/<version>/`, visible from the moment of their manifest."""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from storage.cache import cached_folder
from storage.errors import LakeError, RefError
from storage.manifest import FILE_NAME, FileEntry, Manifest, parse_manifest
from storage.objects import ObjectStore, open_store
from storage.refs import KINDS, DatasetRef, check_name, check_version, fingerprint, is_place, parse_ref
from storage.schema import TABLES
from storage.shards import decode
from storage.stream import damaged, sha256_of
from storage.writer import VersionWriter

if TYPE_CHECKING:
    from pyarrow.dataset import Dataset

__all__ = ["KINDS", "DatasetRef", "FileEntry", "Lake", "Manifest", "VersionWriter", "fingerprint"]


class Lake:
    """Finds, reads and starts versions. Opening one never creates anything."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    @classmethod
    def open(cls, root: str) -> "Lake":
        """The lake in a folder or under s3://BUCKET/PREFIX; LakeError for one that cannot be."""
        return cls(open_store(root))

    @property
    def root(self) -> str:
        """Address of the lake."""
        return self.store.root

    def ref(self, kind: str, name: str, version: str) -> DatasetRef:
        """The reference of a version, whether it exists or not."""
        check_name(kind, name, f"{kind}/{name}")
        check_version(version, f"{kind}/{name}@{version}")
        return DatasetRef(kind, name, version, self.store.uri(f"{kind}/{name}/{version}"))

    def find(self, kind: str, name: str, version: str | None = None) -> DatasetRef | None:
        """A published version, by default the latest; None when there is none."""
        if version is not None:
            ref = self.ref(kind, name, version)
            return ref if self.store.exists(f"{ref.prefix}/{FILE_NAME}") else None
        check_name(kind, name, f"{kind}/{name}")
        found = self.manifests(kind, name)
        return self.ref(kind, name, found[-1].version) if found else None

    def resolve(self, text: str) -> DatasetRef:
        """The version that `kind/name@version` or `kind/name` (latest) names; RefError says what there is."""
        kind, name, version = parse_ref(text)
        ref = self.find(kind, name, version)
        if ref is None:
            known = sorted({f"{m.kind}/{m.name}" for m in self.manifests()})
            raise RefError(f'"{text}" is not in the lake {self.root}; it has {", ".join(known) or "no datasets yet"}')
        return ref

    def manifest(self, ref: DatasetRef) -> Manifest:
        """The manifest of a published version."""
        (data,) = self.store.read_all([f"{ref.prefix}/{FILE_NAME}"])
        if data is None:
            raise RefError(f"{ref} is not in the lake {self.root}; see `winnow datasets`")
        return parse_manifest(data, ref)

    def manifests(self, kind: str | None = None, name: str | None = None) -> list[Manifest]:
        """All manifests (of one kind, of one name), oldest first."""
        refs = self.versions(kind, name)
        found = self.store.read_all([f"{ref.prefix}/{FILE_NAME}" for ref in refs])
        manifests = (parse_manifest(data, ref) for ref, data in zip(refs, found, strict=True) if data is not None)
        return sorted(manifests, key=lambda manifest: (manifest.created_at, manifest.version))

    def versions(self, kind: str | None = None, name: str | None = None) -> list[DatasetRef]:
        """The folders of all versions (of one kind, of one name), published or not."""
        kinds = [kind] if kind else KINDS
        names = ((one, found) for one in kinds for found in ([name] if name else self.store.folders(one)))
        places = ((one, found, version) for one, found in names for version in self.store.folders(f"{one}/{found}"))
        return [self.ref(*place) for place in places if is_place(*place)]

    def iter_shards(self, ref: DatasetRef, table: str, split: str | None = None) -> Iterator[pa.Table]:
        """The shards of a table, one by one, in order; LakeError for one that is not what the manifest lists."""
        for file in self.manifest(ref).shards(table, split):
            yield self._read_shard(ref, table, file)

    def read_shard(self, ref: DatasetRef, table: str, index: int) -> pa.Table:
        """One shard of a table, by its place in the order."""
        return self._read_shard(ref, table, self.manifest(ref).shards(table)[index])

    def _read_shard(self, ref: DatasetRef, table: str, file: FileEntry) -> pa.Table:
        data = self.store.read(f"{ref.prefix}/{file.path}")
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise damaged(str(ref), file)
        return decode(table, data, f"{ref}: {file.path}", "remove that version and run again")

    def read_table(
        self, ref: DatasetRef, table: str, split: str | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """A whole table of a version, or some of its columns; empty when the version has no such shard."""
        chosen = TABLES[table].names if columns is None else list(columns)
        shards = [shard.select(chosen) for shard in self.iter_shards(ref, table, split)]
        return pa.concat_tables([TABLES[table].empty_table().select(chosen), *shards])

    def dataset(self, ref: DatasetRef, table: str, split: str | None = None) -> "Dataset":
        """The shards of a table as one PyArrow dataset, to be read in pieces.

        LakeError for a shard that is missing or is not what the manifest lists; all of them are hashed first.
        """
        files = self.manifest(ref).shards(table, split)
        found = self.shards_dataset(ref, table, files)
        for file in files:
            if sha256_of(self.store, f"{ref.prefix}/{file.path}") != file.sha256:
                raise damaged(str(ref), file)
        return found

    def shards_dataset(
        self, ref: DatasetRef, table: str, files: Sequence[FileEntry], present: Collection[str] | None = None
    ) -> "Dataset":
        """The same without a look at their content; `present` are the lake's keys, where they are known already."""
        import pyarrow.dataset as pads  # with pandas: half a second that most commands have no use for

        keys = [f"{ref.prefix}/{file.path}" for file in files]
        if not keys:
            return pads.dataset(TABLES[table].empty_table())
        missing = sorted(set(keys).difference(self.store.list(ref.prefix) if present is None else present))
        if missing:
            path = missing[0].removeprefix(f"{ref.prefix}/")
            raise LakeError(f"{ref}: {path} is missing; remove that version and run again")
        filesystem, _ = self.store.arrow(keys[0])
        return pads.dataset([self.store.arrow(key)[1] for key in keys], TABLES[table], "parquet", filesystem)

    def folder(self, ref: DatasetRef, prefix: str) -> Path:
        """Local folder of a version's plain files, such as a model; a remote lake's are fetched once and checked."""
        return self.store.local(f"{ref.prefix}/{prefix}") or cached_folder(self.store, self.manifest(ref), prefix)

    def writer(self, kind: str, name: str, version: str) -> VersionWriter:
        """Start or continue a version."""
        return VersionWriter(self.store, self.ref(kind, name, version))
