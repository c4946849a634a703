"""DuckDB over the lake: one view per table, made from the manifests; in memory, or as a file for other tools."""

import json
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads

from storage.drift import check_shards
from storage.errors import LakeError, QueryError
from storage.lake import Lake
from storage.manifest import Manifest
from storage.objects import TEMPORARY
from storage.refs import KINDS
from storage.schema import TABLES
from storage.summary import COUNTERS, counters

VIEWS = (*TABLES, "groups", "cuts", "runs")
# Makes a relation with this name out of the shards of one table in one version: (connection, name, shards).
Attach = Callable[[duckdb.DuckDBPyConnection, str, pads.Dataset], object]
RUNS = pa.schema(
    [
        pa.field("kind", pa.string()),
        pa.field("dataset", pa.string()),
        pa.field("version", pa.string()),
        pa.field("stage", pa.string()),
        pa.field("created_at", pa.timestamp("us", tz="UTC")),
        pa.field("inputs", pa.string()),
        pa.field("config", pa.string()),
        pa.field("stats", pa.string()),
        *(pa.field(name, pa.int64()) for name in COUNTERS),
    ]
)
# One row per dataset and group; `candidates` counts the answers of the dataset of the same name.
_GROUPS = """
CREATE VIEW groups AS
WITH c AS (
    SELECT dataset, "group", COUNT(DISTINCT prompt_id) AS prompts, COUNT(*) AS candidates,
           COUNT(*) FILTER (finish_reason = 'cut') AS cut, AVG(score) AS mean_score
    FROM candidates GROUP BY ALL
),
p AS (
    SELECT dataset, "group", COUNT(*) AS pairs, AVG(score_margin) AS mean_margin FROM preferences GROUP BY ALL
)
SELECT * FROM c FULL JOIN p USING (dataset, "group") ORDER BY dataset, "group"
"""
_CUTS = """
CREATE VIEW cuts AS
SELECT dataset, version, prompt_id, "group", candidate_index, cut.n_tokens, cut.score, cut.kept, finish_reason,
       final_score
FROM (SELECT *, score AS final_score, UNNEST(cuts) AS cut FROM candidates)
"""


@dataclass(frozen=True, slots=True)
class QueryResult:
    """Column names and rows, as Python values."""

    columns: list[str]
    rows: list[tuple[object, ...]]


def query(lake: Lake, sql: str) -> QueryResult:
    """Run one or more read-only statements; QueryError carries the first line of DuckDB's message."""
    with connect(lake) as connection:
        try:
            result = connection.execute(sql)
            # DuckDB's own types do not say it, but text without a statement gives no result at all.
            if not result:
                raise QueryError("query: there is no statement; write one such as SELECT * FROM runs")
            columns = [column[0] for column in result.description or []]
            return QueryResult(columns, result.fetchall() if columns else [])
        except duckdb.Error as error:
            raise QueryError(f"query: {str(error).splitlines()[0]}") from error


@contextmanager
def connect(lake: Lake) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database with all views; its SQL can reach neither files nor the network."""
    with _spill_folder(lake) as spill, duckdb.connect(config={"temp_directory": spill}) as connection:
        _create_views(connection, lake, _attach_dataset)
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        yield connection


@contextmanager
def _spill_folder(lake: Lake) -> Iterator[str]:
    """Where what does not fit into memory goes: the lake's own folder, never the current one. DuckDB removes it."""
    inside = lake.store.local(f"{TEMPORARY}/{uuid.uuid4().hex}")
    if inside is not None:
        yield str(inside)
        return
    with tempfile.TemporaryDirectory(prefix="winnow-query-") as folder:
        yield folder


def write_catalog(lake: Lake, path: Path) -> bool:
    """Write a DuckDB file with the same views, whole or not at all, replacing an older one; True if it holds the rows.

    Over a local lake the views name the lake's files by their absolute path. DuckDB cannot read a remote lake's files
    by itself (httpfs is an extension to be downloaded), so their rows are copied into the file. Either way, versions
    that are made later need a new catalog.
    """
    has_rows = lake.store.local("-") is None
    temporary = path.absolute().with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with duckdb.connect(str(temporary)) as connection:
            _create_views(connection, lake, _put if has_rows else _attach_parquet)
        temporary.replace(path)
    except (OSError, duckdb.Error) as error:
        reason = str(error).splitlines()[0]
        raise LakeError(f'catalog "{path}" cannot be written ({reason}); give a file in a writable folder') from error
    finally:
        temporary.unlink(missing_ok=True)
        temporary.with_name(f"{temporary.name}.wal").unlink(missing_ok=True)
    return has_rows


def _create_views(connection: duckdb.DuckDBPyConnection, lake: Lake, attach: Attach) -> None:
    manifests = lake.manifests()
    latest: dict[tuple[str, str, str], Manifest] = {}
    every: dict[str, list[Manifest]] = {table: [] for table in TABLES}
    for manifest in manifests:
        for table in {file.table for file in manifest.files if file.table in TABLES}:
            every[table].append(manifest)
            latest[table, manifest.kind, manifest.name] = manifest
    present = frozenset(key for kind in KINDS for key in lake.store.list(kind))
    for table in TABLES:
        newest = [manifest for (name, _, _), manifest in latest.items() if name == table]
        current = {manifest.label for manifest in newest}
        names = {manifest.label: f"_{table}_{number}" for number, manifest in enumerate(every[table])}
        for manifest in every[table]:
            ref = lake.ref(manifest.kind, manifest.name, manifest.version)
            shards = lake.shards_dataset(ref, table, manifest.shards(table), present)
            if manifest.label in current:  # one look at every footer; what is older is seldom asked for
                check_shards(shards, table)
            attach(connection, names[manifest.label], shards)
        _create_view(connection, table, newest, names)
        _create_view(connection, f"{table}_versions", every[table], names)
    _put(connection, "runs", _runs(manifests))
    connection.execute(_GROUPS)
    connection.execute(_CUTS)


def _create_view(
    connection: duckdb.DuckDBPyConnection, view: str, manifests: list[Manifest], relations: dict[str, str]
) -> None:
    """One view over a table's shards in several versions, with `dataset` and `version` in front.

    Every name in the SQL is ours: versions are numbered, their names come from a table.
    """
    names = [{"number": i, "dataset": m.name, "version": m.version} for i, m in enumerate(manifests)]
    schema = pa.schema([("number", pa.int64()), ("dataset", pa.string()), ("version", pa.string())])
    _put(connection, f"_{view}_names", pa.Table.from_pylist(names, schema=schema))
    _put(connection, f"_{view}_none", TABLES[view.removesuffix("_versions")].empty_table())
    parts = [f"SELECT n.dataset, n.version, t.* FROM _{view}_none AS t, _{view}_names AS n"]
    for number, manifest in enumerate(manifests):
        relation = relations[manifest.label]
        parts.append(
            f"SELECT n.dataset, n.version, t.* FROM {relation} AS t, _{view}_names AS n WHERE n.number = {number}"
        )
    connection.execute(f"CREATE VIEW {view} AS {' UNION ALL BY NAME '.join(parts)}")


def _put(connection: duckdb.DuckDBPyConnection, name: str, data: pa.Table | pads.Dataset) -> None:
    connection.register("_incoming", data)
    connection.execute(f"CREATE TABLE {name} AS SELECT * FROM _incoming")
    connection.unregister("_incoming")


def _attach_dataset(connection: duckdb.DuckDBPyConnection, name: str, shards: pads.Dataset) -> None:
    connection.register(name, shards)


def _attach_parquet(connection: duckdb.DuckDBPyConnection, name: str, shards: pads.Dataset) -> None:
    # DuckDB takes paths as patterns; in brackets a special character stands for itself.
    connection.from_parquet([re.sub(r"([*?\[])", r"[\1]", file) for file in shards.files]).create_view(name)


def _runs(manifests: list[Manifest]) -> pa.Table:
    rows = [
        {
            "kind": m.kind,
            "dataset": m.name,
            "version": m.version,
            "stage": m.stage,
            "created_at": m.created_at,
            "inputs": json.dumps(m.inputs),
            "config": json.dumps(m.config),
            "stats": json.dumps(m.stats),
            **counters(m),
        }
        for m in manifests
    ]
    return pa.Table.from_pylist(rows, schema=RUNS)
