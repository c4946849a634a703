"""DuckDB over the lake: one view per table, made from the manifests; in memory, or as a file for other tools."""

import json
import re
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
from storage.lake import DatasetRef, Lake
from storage.manifest import Manifest
from storage.objects import TEMPORARY
from storage.schema import TABLES

VIEWS = (*TABLES, "groups", "cuts", "runs")
# Makes a view with this name over Parquet files of one table of the lake: (connection, view, table, files).
Attach = Callable[[duckdb.DuckDBPyConnection, str, str, list[str]], object]
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
    # What does not fit into memory goes into the lake's own folder, never into the current one. DuckDB removes it.
    spill = lake.store.uri(f"{TEMPORARY}/{uuid.uuid4().hex}")
    with duckdb.connect(config={"temp_directory": spill}) as connection:
        _create_views(connection, lake, _attach_dataset)
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        yield connection


def write_catalog(lake: Lake, path: Path) -> None:
    """Write a DuckDB file with the same views, whole or not at all, replacing an older one.

    The views name the lake's files by their absolute path; versions that are made later need a new catalog.
    """
    temporary = path.absolute().with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with duckdb.connect(str(temporary)) as connection:
            _create_views(connection, lake, _attach_parquet)
        temporary.replace(path)
    except (OSError, duckdb.Error) as error:
        reason = str(error).splitlines()[0]
        raise LakeError(f'catalog "{path}" cannot be written ({reason}); give a file in a writable folder') from error
    finally:
        temporary.unlink(missing_ok=True)
        temporary.with_name(f"{temporary.name}.wal").unlink(missing_ok=True)


def _create_views(connection: duckdb.DuckDBPyConnection, lake: Lake, attach: Attach) -> None:
    manifests = lake.manifests()
    latest: dict[tuple[str, str, str], Manifest] = {}
    every: dict[str, list[Manifest]] = {table: [] for table in TABLES}
    for manifest in manifests:
        for table in {file.table for file in manifest.files if file.table in TABLES}:
            every[table].append(manifest)
            latest[table, manifest.kind, manifest.name] = manifest
    for table in TABLES:
        newest = [manifest for (name, _, _), manifest in latest.items() if name == table]
        _create_view(connection, lake, (table, newest), attach)
        _create_view(connection, lake, (f"{table}_versions", every[table]), attach)
    _put(connection, "runs", _runs(manifests))
    connection.execute(_GROUPS)
    connection.execute(_CUTS)


def _create_view(
    connection: duckdb.DuckDBPyConnection, lake: Lake, content: tuple[str, list[Manifest]], attach: Attach
) -> None:
    """One view over a table's shards in several versions, with `dataset` and `version` in front.

    Every name in the SQL is ours: versions are numbered, their names come from a table.
    """
    view, manifests = content
    table = view.removesuffix("_versions")
    names = [{"number": i, "dataset": m.name, "version": m.version} for i, m in enumerate(manifests)]
    schema = pa.schema([("number", pa.int64()), ("dataset", pa.string()), ("version", pa.string())])
    _put(connection, f"_{view}_names", pa.Table.from_pylist(names, schema=schema))
    _put(connection, f"_{view}_none", TABLES[table].empty_table())
    parts = [f"SELECT n.dataset, n.version, t.* FROM _{view}_none AS t, _{view}_names AS n"]
    for number, manifest in enumerate(manifests):
        ref = lake.ref(manifest.kind, manifest.name, manifest.version)
        attach(connection, f"_{view}_{number}", table, [_present(lake, ref, f.path) for f in manifest.shards(table)])
        parts.append(
            f"SELECT n.dataset, n.version, t.* FROM _{view}_{number} AS t, _{view}_names AS n WHERE n.number = {number}"
        )
    connection.execute(f"CREATE VIEW {view} AS {' UNION ALL '.join(parts)}")


def _present(lake: Lake, ref: DatasetRef, path: str) -> str:
    key = f"{ref.prefix}/{path}"
    if not lake.store.exists(key):
        raise LakeError(f"{ref}: {path} is missing; remove that version and run again")
    return lake.store.uri(key)


def _put(connection: duckdb.DuckDBPyConnection, name: str, data: pa.Table) -> None:
    connection.register("_incoming", data)
    connection.execute(f"CREATE TABLE {name} AS SELECT * FROM _incoming")
    connection.unregister("_incoming")


def _attach_dataset(connection: duckdb.DuckDBPyConnection, view: str, table: str, files: list[str]) -> None:
    dataset = pads.dataset(files, schema=TABLES[table], format="parquet")
    check_shards(dataset, TABLES[table])
    connection.register(view, dataset)


def _attach_parquet(connection: duckdb.DuckDBPyConnection, view: str, table: str, files: list[str]) -> None:
    # DuckDB takes paths as patterns; in brackets a special character stands for itself.
    connection.from_parquet([re.sub(r"([*?\[])", r"[\1]", file) for file in files]).create_view(view)


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
        }
        for m in manifests
    ]
    return pa.Table.from_pylist(rows, schema=RUNS)
