"""Writing a version: shards first, each create-only and whole, then the card, then the manifest."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from pydantic import JsonValue

from storage.card import render_card
from storage.errors import LakeError
from storage.lineage import ancestors
from storage.manifest import FILE_NAME, FileEntry, Manifest, now
from storage.objects import ObjectStore
from storage.publish import publish
from storage.refs import DatasetRef
from storage.schema import SCHEMA_VERSION
from storage.shards import Shard, decode, encode
from storage.stream import HashingReader, sha256_of

__all__ = ["Provenance", "Shard", "VersionWriter"]


@dataclass(frozen=True, slots=True)
class Provenance:
    """What made a version."""

    stage: str
    config: Mapping[str, JsonValue]
    inputs: Mapping[str, str]
    stats: Mapping[str, JsonValue]
    command: str


@dataclass(slots=True)
class VersionWriter:
    """Collects the files of one version. Nothing is visible before `commit`; a killed writer's shards are reused."""

    store: ObjectStore
    ref: DatasetRef
    files: dict[str, FileEntry] = field(default_factory=dict)

    def find(self, shard: Shard) -> pa.Table | None:
        """The rows of a shard that is there already, whole and under the right schema: part of the version now."""
        (data,) = self.store.read_all([f"{self.ref.prefix}/{shard.path}"])
        if data is None:
            return None
        rows = self._decode(shard, data)
        self._add(shard, data, rows.num_rows)
        return rows

    def has(self, shard: Shard) -> bool:
        """Whether the shard is there already; it is then part of the version."""
        return self.find(shard) is not None

    def write(self, shard: Shard, data: pa.Table) -> None:
        """Write a shard under its final name; when another writer was faster, its (equal) shard is taken."""
        encoded = encode(shard.table, data)
        if self.store.create(f"{self.ref.prefix}/{shard.path}", encoded):
            self._add(shard, encoded, data.num_rows)
        else:
            self.has(shard)

    def add_tree(self, folder: Path, prefix: str, patterns: Sequence[str] = ("*",)) -> None:
        """Take over the files of a local folder and its subfolders that match a pattern, under `prefix`.

        Files that a killed run left are replaced; those of a published version are never touched.
        """
        if self._is_published():
            return
        found = {path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
        for path in sorted(found):
            inside = f"{prefix}/{path.relative_to(folder).as_posix()}"
            with path.open("rb") as file:
                sent = HashingReader(file)
                self.store.upload(f"{self.ref.prefix}/{inside}", sent)
            self.files[inside] = FileEntry(path=inside, sha256=sent.sha256, size_bytes=sent.size_bytes)

    def commit(self, provenance: Provenance) -> DatasetRef:
        """Publish: the card, then the manifest, create-only. When another writer was faster, its version stands.

        LakeError when another writer has replaced plain files of this one meanwhile (shards cannot be replaced).
        """
        if self._is_published():
            return self.ref
        self._check_plain_files()
        manifest = Manifest(
            kind=self.ref.kind,
            name=self.ref.name,
            version=self.ref.version,
            stage=provenance.stage,
            created_at=now(),
            schema_version=SCHEMA_VERSION,
            config=dict(provenance.config),
            inputs=dict(provenance.inputs),
            stats=dict(provenance.stats),
            command=provenance.command,
            files=tuple(self.files[path] for path in sorted(self.files)),
        )
        card = render_card(manifest, ancestors(self.store, manifest.inputs))
        publish(self.store, manifest, card.encode(), manifest.model_dump_json(indent=2).encode())
        return self.ref

    def _is_published(self) -> bool:
        return self.store.exists(f"{self.ref.prefix}/{FILE_NAME}")

    def _check_plain_files(self) -> None:
        for file in self.files.values():
            if file.table is None and sha256_of(self.store, f"{self.ref.prefix}/{file.path}") != file.sha256:
                raise LakeError(f"{self.ref}: another run writes {file.path} too; wait for it, then run again")

    def _decode(self, shard: Shard, data: bytes) -> pa.Table:
        shown = f"shard {self.store.uri(f'{self.ref.prefix}/{shard.path}')}"
        return decode(shard.table, data, shown, "delete that file and run again")

    def _add(self, shard: Shard, data: bytes, n_rows: int) -> None:
        self.files[shard.path] = FileEntry(
            path=shard.path,
            sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
            rows=n_rows,
            table=shard.table,
            split=shard.split,
        )
