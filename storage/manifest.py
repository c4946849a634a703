"""The manifest: the one file that makes a version exist, and all that readers trust."""

from datetime import UTC, datetime
from pathlib import PurePosixPath

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from storage.errors import LakeError
from storage.refs import DatasetRef
from storage.schema import SCHEMA_VERSION

FILE_NAME = "manifest.json"


class FileEntry(BaseModel):
    """One file of a version; `table`, `split` and `rows` for Parquet shards only."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)
    rows: int | None = Field(default=None, ge=0)
    table: str | None = None
    split: str | None = None

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        parts = PurePosixPath(path).parts
        is_plain = path.isprintable() and "\\" not in path and "/".join(parts) == path
        if not parts or not is_plain or ".." in parts or path.startswith("/"):
            raise ValueError(f'path "{path}" leads out of the version')
        return path


class Manifest(BaseModel):
    """What a version is, what it was made from, and its files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    name: str
    version: str
    stage: str
    created_at: AwareDatetime
    schema_version: int
    config: dict[str, JsonValue]
    inputs: dict[str, str]
    stats: dict[str, JsonValue]
    command: str
    files: tuple[FileEntry, ...]

    @property
    def label(self) -> str:
        """kind/name@version."""
        return f"{self.kind}/{self.name}@{self.version}"

    @property
    def prefix(self) -> str:
        """The version's folder inside the lake."""
        return f"{self.kind}/{self.name}/{self.version}"

    def shards(self, table: str, split: str | None = None) -> list[FileEntry]:
        """The shards of a table, in order."""
        found = [file for file in self.files if file.table == table and split in (None, file.split)]
        return sorted(found, key=lambda file: file.path)


def parse_manifest(data: bytes, ref: DatasetRef) -> Manifest:
    """Validate a manifest read from the lake; LakeError when it is damaged or lies about its place."""
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "file"
        raise LakeError(f"the manifest of {ref} is damaged ({place}: {first['msg']}); remove that version") from error
    if (manifest.kind, manifest.name, manifest.version) != (ref.kind, ref.name, ref.version):
        raise LakeError(f"the manifest of {ref} says it is {manifest.label}; remove that version")
    if manifest.schema_version > SCHEMA_VERSION:
        raise LakeError(f"{ref} was written by a newer Winnow (schema {manifest.schema_version}); update this one")
    return manifest


def now() -> datetime:
    """The time that goes into a manifest."""
    return datetime.now(UTC)
