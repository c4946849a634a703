from pathlib import Path

import duckdb
import pytest

from storage.catalog import VIEWS, connect, query, write_catalog
from storage.errors import LakeError, QueryError
from storage.lake import Lake
from tests.storage.rows import publish_candidates


@pytest.mark.parametrize("sql", ["", "  ", ";", "-- nothing"])
def test_text_without_a_statement_is_refused(tmp_path: Path, sql: str) -> None:
    with pytest.raises(QueryError, match="there is no statement"):
        query(Lake.open(str(tmp_path)), sql)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM glob('{lake}/*')",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM read_blob('/etc/passwd')",
        "SELECT * FROM '/etc/passwd.csv'",
        "SELECT * FROM parquet_metadata('{shard}')",
        "SELECT * FROM read_parquet('{shard}')",
        "EXPORT DATABASE '{out}'",
        "IMPORT DATABASE '{lake}'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "CREATE PERSISTENT SECRET s (TYPE S3)",
        "RESET temp_directory",
        "SET lock_configuration = false",
        "PRAGMA profiling_output = '{out}'",
        "SELECT getenv('HOME')",
        "SELECT * FROM lake",
    ],
)
def test_sql_reaches_no_file_no_setting_and_no_variable(tmp_path: Path, sql: str) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    ref = publish_candidates(lake)
    shard = Path(ref.uri) / lake.manifest(ref).files[0].path
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(QueryError) as caught:
        query(lake, sql.format(lake=lake.root, shard=shard, out=tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_query_changes_is_gone_with_it(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    publish_candidates(lake)
    query(lake, "DROP VIEW groups; DELETE FROM runs; CREATE TABLE mine AS SELECT 1")
    assert query(lake, "SELECT COUNT(*) FROM runs").rows == [(1,)]
    with pytest.raises(QueryError, match="mine"):
        query(lake, "SELECT * FROM mine")


def test_a_large_query_spills_into_the_lake_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake, here = Lake.open(str(tmp_path / "lake")), tmp_path / "here"
    publish_candidates(lake)
    here.mkdir()
    monkeypatch.chdir(here)
    with connect(lake) as connection:
        (folder,) = connection.execute("SELECT current_setting('temp_directory')").fetchall()[0]
        assert Path(folder).parent == tmp_path / "lake" / ".tmp"
    assert list(here.iterdir()) == list((tmp_path / "lake" / ".tmp").iterdir()) == []


@pytest.mark.parametrize("sql", ["SELECT COUNT(*) FROM candidates", "SELECT 1"])
def test_a_missing_shard_is_one_line_that_names_it(tmp_path: Path, sql: str) -> None:
    lake = Lake.open(str(tmp_path))
    ref = publish_candidates(lake)
    path = lake.manifest(ref).files[0].path
    (Path(ref.uri) / path).unlink()
    with pytest.raises(LakeError, match=f"{ref}: {path} is missing"):
        query(lake, sql)


def test_a_damaged_shard_is_one_line(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    ref = publish_candidates(lake)
    (Path(ref.uri) / lake.manifest(ref).files[0].path).write_bytes(b"PAR1 half")
    with pytest.raises(QueryError) as caught:
        query(lake, "SELECT SUM(n_tokens) FROM candidates")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["lake", "we'ird [x]* {y}"])
def test_a_catalog_file_answers_like_the_lake(tmp_path: Path, folder: str) -> None:
    lake, path = Lake.open(str(tmp_path / folder)), tmp_path / "lake.duckdb"
    publish_candidates(lake, "a" * 12, 2)
    write_catalog(lake, path)
    publish_candidates(lake, "b" * 12, 3)
    write_catalog(lake, path)
    assert {entry.name for entry in tmp_path.iterdir()} == {folder, "lake.duckdb"}
    with duckdb.connect(str(path), read_only=True) as connection:
        for view in (*VIEWS, "candidates_versions"):
            sql = f"SELECT * FROM {view} ORDER BY ALL"
            assert connection.execute(sql).fetchall() == query(lake, sql).rows
        assert connection.execute("SELECT COUNT(*) FROM candidates_versions").fetchall() == [(5,)]


def test_a_catalog_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    ref = publish_candidates(lake)
    path = tmp_path / "lake.duckdb"
    write_catalog(lake, path)
    before = path.read_bytes()
    for bad in (tmp_path / "lake", tmp_path / "nowhere" / "x.duckdb"):
        with pytest.raises(LakeError, match="cannot be written") as caught:
            write_catalog(lake, bad)
        assert "\n" not in str(caught.value)
    (Path(ref.uri) / lake.manifest(ref).files[0].path).unlink()
    with pytest.raises(LakeError, match="is missing"):
        write_catalog(lake, path)
    assert path.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"lake", "lake.duckdb"}
