"""Writing a version: shards first, each create-only and whole, then the card, then the manifest."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from storage.card import render_card
from storage.errors import LakeError
from storage.manifest import FILE_NAME, FileEntry, Manifest, now
from storage.objects import ObjectStore
from storage.refs import DatasetRef
from storage.schema import SCHEMA_VERSION, TABLES, checked

ROW_GROUP_ROWS = 10_000


@dataclass(frozen=True, slots=True)
class Shard:
    """The place of a shard: `<table>/<split>-<index>-of-<count>.parquet`."""

    table: str
    split: str
    index: int
    count: int

    @property
    def path(self) -> str:
        """Path inside the version."""
        return f"{self.table}/{self.split}-{self.index:05d}-of-{self.count:05d}.parquet"


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

    def has(self, shard: Shard) -> bool:
        """Whether the shard is there already, whole and under the right schema; it is then part of the version."""
        key = f"{self.ref.prefix}/{shard.path}"
        if not self.store.exists(key):
            return False
        data = self.store.read(key)
        try:
            found = pq.read_table(io.BytesIO(data), partitioning=None)
        except pa.ArrowInvalid as error:
            raise LakeError(f"shard {self.store.uri(key)} is damaged; delete that file and run again") from error
        if not found.schema.equals(TABLES[shard.table]):
            raise LakeError(f"shard {self.store.uri(key)} has another schema; delete that file and run again")
        self._add(shard, data, found.num_rows)
        return True

    def read(self, shard: Shard) -> pa.Table:
        """A shard that is there already."""
        data = self.store.read(f"{self.ref.prefix}/{shard.path}")
        return pq.read_table(io.BytesIO(data), partitioning=None)

    def write(self, shard: Shard, data: pa.Table) -> None:
        """Write a shard under its final name; when another writer was faster, its (equal) shard is taken."""
        encoded = _encode(checked(shard.table, data))
        if self.store.create(f"{self.ref.prefix}/{shard.path}", encoded):
            self._add(shard, encoded, data.num_rows)
        else:
            self.has(shard)

    def add_tree(self, folder: Path, prefix: str, patterns: Sequence[str] = ("*",)) -> None:
        """Take over the files of a local folder and its subfolders that match a pattern, under `prefix`."""
        found = {path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
        for path in sorted(found):
            inside = f"{prefix}/{path.relative_to(folder).as_posix()}"
            self.store.upload(f"{self.ref.prefix}/{inside}", path)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self.files[inside] = FileEntry(path=inside, sha256=digest, size_bytes=path.stat().st_size)

    def commit(self, provenance: Provenance) -> DatasetRef:
        """Publish: the card, then the manifest, create-only. When another writer was faster, its version stands."""
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
        self.store.create(f"{self.ref.prefix}/README.md", render_card(manifest).encode())
        self.store.create(f"{self.ref.prefix}/{FILE_NAME}", manifest.model_dump_json(indent=2).encode())
        return self.ref

    def _add(self, shard: Shard, data: bytes, n_rows: int) -> None:
        self.files[shard.path] = FileEntry(
            path=shard.path,
            sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
            rows=n_rows,
            table=shard.table,
            split=shard.split,
        )


def _encode(data: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(data, sink, compression="zstd", row_group_size=ROW_GROUP_ROWS, write_page_index=True)
    return sink.getvalue()
