"""Shards from before a schema grew are read as if their new columns had been null."""

import hashlib
import io
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.catalog import query, write_catalog
from storage.errors import LakeError
from storage.lake import DatasetRef, FileEntry, Lake
from storage.schema import MESSAGES, PREFERENCES, grown, to_table
from storage.shards import decode
from storage.verify import verify
from storage.writer import Provenance, Shard

NEW = ("n_votes", "agreement", "annotator")
# The table as the first Winnow wrote it.
OLD = pa.schema(
    [
        *(pa.field(name, MESSAGES, nullable=False) for name in ("prompt", "chosen", "rejected")),
        *(pa.field(name, pa.string(), nullable=False) for name in ("prompt_id", "group")),
        *(pa.field(f"score_{name}", pa.float64(), nullable=False) for name in ("chosen", "rejected", "margin")),
        pa.field("strategy", pa.string(), nullable=False),
        pa.field("chosen_index", pa.int32(), nullable=False),
        pa.field("rejected_index", pa.int32(), nullable=False),
        pa.field("policy_logp_ref_chosen", pa.float64()),
        pa.field("policy_logp_ref_rejected", pa.float64()),
    ]
)


def pair(number: int) -> dict[str, object]:
    """A row of `preferences` with scores."""
    return {
        **{name: [{"role": "user", "content": f"{name} {number}"}] for name in ("prompt", "chosen", "rejected")},
        **{"prompt_id": f"p{number}", "group": "g", "strategy": "best_vs_worst"},
        **{"score_chosen": 2.0, "score_rejected": 0.5, "score_margin": 1.5, "chosen_index": 0, "rejected_index": 1},
        **{"policy_logp_ref_chosen": None, "policy_logp_ref_rejected": None},
    }


def _encoded(rows: list[dict[str, object]], schema: pa.Schema) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    return sink.getvalue()


def _publish_old(lake: Lake, rows: list[dict[str, object]]) -> DatasetRef:
    writer, shard = lake.writer("preferences", "old", "0" * 12), Shard("preferences", "train", 0, 1)
    data = _encoded(rows, OLD)
    lake.store.create(f"{writer.ref.prefix}/{shard.path}", data)
    writer.files[shard.path] = FileEntry(
        path=shard.path,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        rows=len(rows),
        table="preferences",
        split="train",
    )
    return writer.commit(Provenance("assemble", {}, {}, {}, "winnow"))


def test_an_old_version_is_read_verified_and_queried_beside_a_new_one(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    old = _publish_old(lake, [pair(0), pair(1)])
    writer = lake.writer("preferences", "old", "1" * 12)
    human = {"score_chosen": None, "score_rejected": None, "score_margin": None}
    new_row = pair(2) | human | {"n_votes": 3, "agreement": 1.0, "annotator": None}
    writer.write(Shard("preferences", "train", 0, 1), to_table("preferences", [new_row]))
    writer.commit(Provenance("import", {}, {}, {}, "winnow"))
    expected = [pair(i) | dict.fromkeys(NEW) for i in (0, 1)]
    assert lake.read_table(old, "preferences").to_pylist() == expected
    assert lake.dataset(old, "preferences").to_table().to_pylist() == expected
    assert [verdict.problem for verdict in verify(lake, old)] == [None]
    sql = "SELECT prompt_id, score_margin, n_votes FROM preferences_versions ORDER BY prompt_id"
    rows = [("p0", 1.5, None), ("p1", 1.5, None), ("p2", None, 3)]
    assert query(lake, sql).rows == rows
    write_catalog(lake, tmp_path / "lake.duckdb")
    with duckdb.connect(str(tmp_path / "lake.duckdb"), read_only=True) as connection:
        assert connection.execute(sql).fetchall() == rows


def test_a_shard_of_a_killed_older_writer_is_taken_over(tmp_path: Path) -> None:
    lake, shard = Lake.open(str(tmp_path / "lake")), Shard("preferences", "train", 0, 1)
    writer = lake.writer("preferences", "old", "2" * 12)
    lake.store.create(f"{writer.ref.prefix}/{shard.path}", _encoded([pair(0)], OLD))
    assert writer.has(shard)
    ref = writer.commit(Provenance("assemble", {}, {}, {}, "winnow"))
    assert lake.read_table(ref, "preferences")["n_votes"].to_pylist() == [None]


@pytest.mark.parametrize(
    "schema",
    [
        pa.schema([field for field in OLD if field.name != "group"]),
        OLD.set(4, pa.field("group", pa.int64(), nullable=False)),
        OLD.set(4, pa.field("group", pa.string())),
        OLD.append(pa.field("stranger", pa.string())),
        OLD.append(pa.field("n_votes", pa.int64())),
    ],
    ids=["column missing", "other type", "may be null", "unknown column", "new column, other type"],
)
def test_what_no_winnow_wrote_is_refused(schema: pa.Schema) -> None:
    row = {field.name: None for field in schema} | {k: v for k, v in pair(0).items() if k in schema.names}
    if pa.types.is_integer(schema.field("group").type if "group" in schema.names else pa.null()):
        row["group"] = 1
    with pytest.raises(LakeError, match="has another schema"):
        decode("preferences", _encoded([row], schema), "it", "remove it")


def test_a_table_under_todays_schema_grows_into_itself() -> None:
    table = to_table("preferences", [pair(0) | dict.fromkeys(NEW)])
    again = grown("preferences", table)
    assert again is not None and again.equals(table) and again.schema.equals(PREFERENCES)
