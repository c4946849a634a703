import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from storage.catalog import query
from storage.errors import StorageError
from storage.lake import Lake
from storage.results import stream_csv, write_query
from tests.storage.rows import candidate, dialogue, publish

SQL = "SELECT prompt_id, candidate_index AS i, score, response, error, n_tokens > 1 AS l FROM candidates ORDER BY 1, 2"


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    lake = Lake.open(str(tmp_path / "lake"))
    rows = [candidate("p0", 0, 0.1), candidate("p0", 1, None), candidate("p1", 0, 1e300, response='a "b",\nc')]
    publish(lake, "candidates", rows)
    return lake


def test_parquet_and_csv_hold_what_the_query_gives(lake: Lake, tmp_path: Path) -> None:
    expected = query(lake, SQL)
    for path in (tmp_path / "rows.parquet", tmp_path / "rows.csv"):
        written = write_query(lake, SQL, path)
        assert (written.columns, written.n_rows) == (expected.columns, 3)
        read = pq.read_table(path) if path.suffix == ".parquet" else _read_csv(path.read_bytes())
        assert [tuple(row.values()) for row in read.to_pylist()] == expected.rows
    sink = io.BytesIO()
    assert stream_csv(lake, SQL, sink).n_rows == 3
    assert sink.getvalue() == (tmp_path / "rows.csv").read_bytes()


def _read_csv(data: bytes) -> "pq.Table":
    empty_is_text = pacsv.ConvertOptions(strings_can_be_null=True, quoted_strings_can_be_null=False)
    return pacsv.read_csv(
        io.BytesIO(data), parse_options=pacsv.ParseOptions(newlines_in_values=True), convert_options=empty_is_text
    )


def test_a_result_without_rows_has_its_columns(lake: Lake, tmp_path: Path) -> None:
    sql = "SELECT prompt_id, score FROM candidates WHERE false"
    assert write_query(lake, sql, tmp_path / "rows.csv").n_rows == 0
    assert (tmp_path / "rows.csv").read_text() == '"prompt_id","score"\n'
    assert write_query(lake, sql, tmp_path / "rows.parquet").n_rows == 0
    assert pq.read_table(tmp_path / "rows.parquet").column_names == ["prompt_id", "score"]


@pytest.mark.parametrize(
    ("sql", "suffix", "message"),
    [
        ("SELEC 1", ".csv", "syntax error"),
        ("", ".csv", "there is no result to write"),
        ("SELECT * FROM nothing", ".parquet", "nothing does not exist"),
        ("SELECT 1 AS a, 2 AS a", ".parquet", '2 columns are named "a"; give them names with AS'),
        ("SELECT cuts FROM candidates", ".csv", 'column "cuts" is a list or struct, which CSV cannot hold'),
        ("SELECT INTERVAL 1 DAY AS i", ".parquet", "interval"),
        ("SELECT error(concat('first', chr(10), 'second'))", ".csv", "first"),
        # The error comes after rows have been written.
        ("SELECT CASE WHEN i = 500000 THEN error('late') ELSE i END AS i FROM range(600000) AS r(i)", ".csv", "late"),
        ("SELECT CAST(IF(i = 500000, 'x', '1') AS INT) AS i FROM range(600000) AS r(i)", ".parquet", "'x'"),
    ],
)
def test_a_refused_statement_is_one_line_and_leaves_the_older_file(
    lake: Lake, tmp_path: Path, sql: str, suffix: str, message: str
) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text("older")
    with pytest.raises(StorageError, match=message) as caught:
        write_query(lake, sql, path)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "older"
    assert {entry.name for entry in tmp_path.iterdir()} == {"lake", path.name}


@pytest.mark.parametrize(
    "sql",
    [
        "COPY (SELECT 1) TO '{out}'",
        "COPY candidates TO '{out}' (FORMAT parquet)",
        "ATTACH '{out}' AS other",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_json('{lake}')",
        "SELECT * FROM sniff_csv('/etc/passwd')",
        "SELECT * FROM 'http://127.0.0.1:9/x.csv'",
        "SELECT * FROM read_parquet('s3://bucket/x.parquet')",
        "SELECT * FROM sqlite_scan('{out}', 't')",
        "SET enable_external_access = true",
        "SET temp_directory = '{out}'",
        "SET python_enable_replacements = true",
    ],
)
def test_statements_that_are_written_reach_no_file_and_no_network(lake: Lake, tmp_path: Path, sql: str) -> None:
    statement = sql.format(out=tmp_path / "out", lake=lake.root)
    before = sorted(tmp_path.rglob("*"))
    for run in (lambda: write_query(lake, statement, tmp_path / "rows.csv"), lambda: query(lake, statement)):
        with pytest.raises(StorageError) as caught:
            run()
        assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


HOSTILE = ["a'; DROP VIEW candidates; --", 'b" OR 1=1', "\\'; --", "$1", "?", "\x00inside", "\u202egroup"]


def test_hostile_values_come_back_as_they_are(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    rows = [candidate(f"p{i}", 0, 1.0, group=text, response=text) for i, text in enumerate(HOSTILE)]
    publish(lake, "candidates", rows)
    publish(lake, "preferences", [dialogue(f"p{i}", text) for i, text in enumerate(HOSTILE)])
    assert sorted(row[0] for row in query(lake, 'SELECT "group" FROM groups').rows) == sorted(HOSTILE)
    path = tmp_path / "rows.parquet"
    write_query(lake, 'SELECT "group", response FROM candidates', path)
    assert sorted(pq.read_table(path)["response"].to_pylist()) == sorted(HOSTILE)
    assert query(lake, "SELECT COUNT(*) FROM candidates").rows == [(len(HOSTILE),)]


@pytest.mark.parametrize("name", ["a'; drop table x; --", "../other", "a/b", "A", "", "x" * 65])
def test_a_hostile_name_never_becomes_a_dataset(tmp_path: Path, name: str) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    with pytest.raises(StorageError, match="a name has 1 to 64"):
        lake.writer("candidates", name, "a" * 12)
    assert query(lake, "SELECT * FROM runs").rows == []


def test_queries_at_once_do_not_disturb_each_other(lake: Lake, tmp_path: Path) -> None:
    def run(number: int) -> int:
        path = tmp_path / f"{number}.parquet"
        sql = f"CREATE TABLE mine AS SELECT {number} AS n; SELECT n, i FROM mine, range(20000) AS r(i) ORDER BY i DESC"
        write_query(lake, sql, path)
        assert set(pq.read_table(path)["n"].to_pylist()) == {number}
        return query(lake, "SELECT COUNT(*) FROM candidates").rows[0][0]  # type: ignore[return-value]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(8))) == [3] * 8
    assert list((tmp_path / "lake" / ".tmp").glob("*")) == []


def test_two_processes_query_one_lake(lake: Lake) -> None:
    script = (
        "import sys; from storage.lake import Lake; from storage.catalog import query\n"
        "for _ in range(5): assert query(Lake.open(sys.argv[1]), 'SELECT COUNT(*) FROM candidates').rows == [(3,)]\n"
    )
    command = [sys.executable, "-c", script, lake.root]
    running = [subprocess.Popen(command, cwd=Path(__file__).parents[2]) for _ in range(2)]
    assert [process.wait(60) for process in running] == [0, 0]


@pytest.mark.slow
def test_a_result_larger_than_the_memory_is_streamed(tmp_path: Path) -> None:
    script = (
        "import resource, sys\n"
        "from storage.lake import Lake; from storage.results import stream_csv\n"
        "lake = Lake.open(sys.argv[1])\n"
        "def peak(n):\n"
        "    sql = f\"SELECT i, repeat('some text ', 30) AS t FROM range({n}) AS r(i)\"\n"
        "    with open('/dev/null', 'wb') as sink:\n"
        "        assert stream_csv(lake, sql, sink).n_rows == n\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "small = peak(100_000)\n"
        "assert peak(5_000_000) - small < 300_000_000\n"  # the result itself: 1.5 GB
    )
    command = [sys.executable, "-c", script, str(tmp_path / "lake")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
