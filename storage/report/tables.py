"""The tables that a report is about as DuckDB views, read from the lake in pieces."""

import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import duckdb
import pyarrow as pa

from storage.errors import LakeError
from storage.lake import DatasetRef, Lake, Manifest
from storage.lineage import ancestors, content_line
from storage.schema import TABLES

# Tables of an ancestor that say something about a version of this kind.
_FROM_ANCESTORS = {"preferences": ("candidates", "prompts"), "candidates": ("prompts",)}


@dataclass(frozen=True, slots=True)
class Subject:
    """A version, its ancestors (kind/name@version -> manifest), and whose table is shown under each table's name."""

    ref: DatasetRef
    manifest: Manifest
    known: Mapping[str, Manifest]
    owners: Mapping[str, Manifest]

    def has(self, table: str) -> bool:
        """Whether the table has a shard."""
        return table in self.owners


def subject(lake: Lake, ref: DatasetRef) -> Subject:
    """What a report on `ref` is about; RefError for what is not published."""
    manifest = lake.manifest(ref)
    known = ancestors(lake.store, manifest.inputs)
    owners = {str(file.table): manifest for file in manifest.files if file.table in TABLES}
    for table in _FROM_ANCESTORS.get(manifest.kind, ()):
        owner = next((one for one in content_line(manifest, known) if one.shards(table)), None)
        if owner is not None:
            owners.setdefault(table, owner)
    if manifest.kind == "models":
        evaluation = _evaluation(lake, manifest)
        if evaluation is not None:
            owners["metrics"] = evaluation
    return Subject(ref, manifest, known, owners)


@contextmanager
def open_tables(
    lake: Lake, about: Subject, tables: Collection[str] = tuple(TABLES)
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database with a view for each of the tables, with `split` in front; empty where the version has none.

    All of their shards are hashed first, so ask for no more than is needed.
    """
    # What does not fit into memory is spilled here; the lake itself may be on S3.
    with (
        tempfile.TemporaryDirectory(prefix="winnow-report-") as spill,
        # One thread adds floats in one order: equal versions give equal reports.
        duckdb.connect(config={"temp_directory": spill, "threads": 1}) as connection,
    ):
        for table in tables:
            _create_view(connection, lake, table, about.owners.get(table))
        connection.execute("SET enable_external_access = false")
        try:
            yield connection
        # How a damaged or missing file shows up; errors of other kinds are ours.
        except (duckdb.InvalidInputException, duckdb.IOException, pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0].rpartition("failed: ")[2]
            raise LakeError(f"{about.ref} cannot be read ({reason}); see `winnow verify`") from error


def _create_view(connection: duckdb.DuckDBPyConnection, lake: Lake, table: str, owner: Manifest | None) -> None:
    """Splits are named in a table, never in the SQL: a manifest may hold any text."""
    splits = sorted({str(file.split) for file in owner.shards(table)}) if owner else []
    names = pa.table({"number": pa.array(range(len(splits)), pa.int64()), "split": pa.array(splits, pa.string())})
    connection.register(f"_{table}_splits", names)
    connection.register(f"_{table}_none", TABLES[table].empty_table())
    parts = [f"SELECT s.split, t.* FROM _{table}_none AS t, _{table}_splits AS s"]
    for number, split in enumerate(splits):
        assert owner is not None
        ref = lake.ref(owner.kind, owner.name, owner.version)
        connection.register(f"_{table}_{number}", lake.dataset(ref, table, split))
        parts.append(f"SELECT s.split, t.* FROM _{table}_{number} AS t, _{table}_splits AS s WHERE s.number = {number}")
    connection.execute(f"CREATE VIEW {table} AS {' UNION ALL '.join(parts)}")


def _evaluation(lake: Lake, model: Manifest) -> Manifest | None:
    """The latest evaluation in which the model came after."""
    found = [one for one in lake.manifests("candidates") if one.inputs.get("after") == model.label]
    return next((one for one in reversed(found) if one.shards("metrics")), None)
