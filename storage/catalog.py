"""DuckDB over the lake: an in-memory database with one view per table, made from the manifests."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads

from storage.errors import QueryError
from storage.lake import Lake
from storage.manifest import Manifest
from storage.schema import TABLES

VIEWS = (*TABLES, "groups", "cuts", "runs")
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
SELECT dataset, version, prompt_id, "group", candidate_index, cut.n_tokens, cut.score, cut.kept
FROM (SELECT *, UNNEST(cuts) AS cut FROM candidates)
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
            columns = [column[0] for column in result.description or []]
            return QueryResult(columns, result.fetchall() if columns else [])
        except duckdb.Error as error:
            raise QueryError(f"query: {str(error).splitlines()[0]}") from error


@contextmanager
def connect(lake: Lake) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database with all views; its SQL can reach neither files nor the network."""
    with duckdb.connect() as connection:
        latest: dict[tuple[str, str, str], list[Manifest]] = {}
        every: dict[str, list[Manifest]] = {table: [] for table in TABLES}
        manifests = lake.manifests()
        for manifest in manifests:
            for table in {file.table for file in manifest.files if file.table in TABLES}:
                every[table].append(manifest)
                latest[table, manifest.kind, manifest.name] = [manifest]
        for table in TABLES:
            newest = [one for (name, _, _), (one,) in latest.items() if name == table]
            _create_view(connection, lake, table, newest)
            _create_view(connection, lake, f"{table}_versions", every[table])
        connection.register("runs", _runs(manifests))
        connection.execute(_GROUPS)
        connection.execute(_CUTS)
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        yield connection


def _create_view(connection: duckdb.DuckDBPyConnection, lake: Lake, view: str, manifests: list[Manifest]) -> None:
    """One view over a table's shards in several versions, with `dataset` and `version` in front.

    Every name in the SQL is ours: versions are numbered, their names come from a registered table.
    """
    table = view.removesuffix("_versions")
    names = [{"number": i, "dataset": m.name, "version": m.version} for i, m in enumerate(manifests)]
    schema = pa.schema([("number", pa.int64()), ("dataset", pa.string()), ("version", pa.string())])
    connection.register(f"_{view}_names", pa.Table.from_pylist(names, schema=schema))
    connection.register(f"_{view}_none", TABLES[table].empty_table())
    parts = [f"SELECT n.dataset, n.version, t.* FROM _{view}_none AS t, _{view}_names AS n"]
    for number, manifest in enumerate(manifests):
        ref = lake.ref(manifest.kind, manifest.name, manifest.version)
        files = [lake.store.uri(f"{ref.prefix}/{file.path}") for file in manifest.shards(table)]
        connection.register(f"_{view}_{number}", pads.dataset(files, schema=TABLES[table], format="parquet"))
        parts.append(
            f"SELECT n.dataset, n.version, t.* FROM _{view}_{number} AS t, _{view}_names AS n WHERE n.number = {number}"
        )
    connection.execute(f"CREATE VIEW {view} AS {' UNION ALL '.join(parts)}")


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
