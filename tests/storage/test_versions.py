"""Versions over a local folder and over S3: written twice, found, listed, damaged, queried."""

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pytest

from storage.catalog import VIEWS, connect, query, write_catalog
from storage.copy import copy
from storage.errors import LakeError, QueryError, RefError
from storage.lake import Lake
from storage.manifest import FILE_NAME
from storage.objects import Stored
from storage.schema import to_table
from storage.verify import verify
from storage.writer import Shard
from tests.storage.rows import VERSION, candidate, problems, publish_candidates, put

ROOT = Path(__file__).parents[2]
WRITE = f"""
import sys
from storage.lake import Lake
from storage.schema import to_table
from storage.writer import Provenance, Shard
from tests.storage.rows import candidate

writer = Lake.open(sys.argv[1]).writer("candidates", "demo", "{VERSION}")
print("ready", flush=True)
sys.stdin.readline()
for index in range(3):
    rows = [candidate(f"p{{index}}-{{i}}", 0, float(i)) for i in range(200)]
    writer.write(Shard("candidates", "train", index, 3), to_table("candidates", rows))
print(writer.commit(Provenance("generate", {{}}, {{}}, {{"writer": sys.argv[2]}}, "winnow")), flush=True)
"""


def test_two_writers_of_one_version_publish_it_once(root: str, lake: Lake) -> None:
    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WRITE, root, name]
        return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with start("one") as one, start("other") as other:
        for process in (one, other):
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in (one, other):
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in (one, other):
            assert process.stdout is not None
            assert process.stdout.readline() == f"candidates/demo@{VERSION}\n"
    (manifest,) = lake.manifests()
    assert manifest.stats["writer"] in ("one", "other")
    assert lake.read_table(lake.resolve("candidates/demo"), "candidates").num_rows == 600
    assert problems(lake, lake.resolve("candidates/demo")) == {}


def test_versions_are_found_whatever_lies_beside_them(lake: Lake) -> None:
    refs = [publish_candidates(lake, f"{number:012x}", 1) for number in range(5)]
    for key in (
        "candidates/demo/notes.txt",
        "candidates/demo/not-a-version/manifest.json",
        "elsewhere/x",
        "candidates/y",
    ):
        put(lake, key, b"x")
    lake.writer("candidates", "demo", "f" * 12).write(
        Shard("candidates", "train", 0, 1), to_table("candidates", [candidate()])
    )
    assert [manifest.version for manifest in lake.manifests()] == [ref.version for ref in refs]
    assert lake.find("candidates", "demo") == refs[-1]
    assert lake.find("candidates", "demo", "f" * 12) is None
    assert lake.manifests("prompts") == []


def test_looking_for_one_name_reads_no_other(lake: Lake) -> None:
    ref = publish_candidates(lake)
    put(lake, f"candidates/other/{VERSION}/{FILE_NAME}", b"damaged")
    assert lake.find("candidates", "demo") == ref
    with pytest.raises(LakeError, match="damaged"):
        lake.manifests()


@pytest.mark.parametrize("name", ["../../x", "a'; drop table x", "", "A", "x" * 65])
def test_hostile_names_are_refused(lake: Lake, name: str) -> None:
    for use in (lambda: lake.find("models", name), lambda: lake.writer("models", name, VERSION)):
        with pytest.raises(RefError):
            use()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "f" * 12}, "says it is"),
        ({"surprise": 1}, "is damaged"),
        ({"files": [{"path": "../../x", "sha256": "0" * 64, "size_bytes": 1}]}, "leads out of the version"),
        ({"schema_version": 99}, "newer Winnow"),
    ],
)
def test_a_manifest_that_lies_is_refused(lake: Lake, change: dict[str, object], message: str, tmp_path: Path) -> None:
    ref = publish_candidates(lake)
    key = f"{ref.prefix}/{FILE_NAME}"
    put(lake, key, json.dumps(json.loads(lake.store.read(key)) | change).encode())
    uses: list[Callable[[], object]] = [
        lambda: lake.manifest(ref),
        lake.manifests,
        lambda: query(lake, "SELECT 1"),
        lambda: list(verify(lake, ref)),
        lambda: copy(lake, ref, Lake.open(str(tmp_path / "other"))),
        lambda: lake.dataset(ref, "candidates"),
    ]
    for use in uses:
        with pytest.raises(LakeError, match=message):
            use()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-20], lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:]]
)
def test_damaged_parquet_is_named_and_never_read_or_copied(
    lake: Lake, damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    ref, other = publish_candidates(lake), Lake.open(str(tmp_path / "other"))
    path = lake.manifest(ref).files[0].path
    put(lake, f"{ref.prefix}/{path}", damage(lake.store.read(f"{ref.prefix}/{path}")))
    assert list(problems(lake, ref)) == [path]
    for use in (lambda: lake.read_table(ref, "candidates"), lambda: copy(lake, ref, other)):
        with pytest.raises(LakeError, match="is damaged"):
            use()
    assert list(other.store.list("")) == []


def test_a_shard_that_is_no_parquet_is_one_line_in_a_query(lake: Lake) -> None:
    ref = publish_candidates(lake)
    put(lake, f"{ref.prefix}/{lake.manifest(ref).files[0].path}", b"PAR1 half")
    with pytest.raises(QueryError) as caught:
        query(lake, "SELECT SUM(n_tokens) FROM candidates")
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(lake: Lake) -> None:
    ref = publish_candidates(lake)
    path = lake.manifest(ref).files[0].path
    lake.store.delete(Stored(f"{ref.prefix}/{path}", 0, datetime.now(UTC)))
    for use in (lambda: query(lake, "SELECT 1"), lambda: lake.dataset(ref, "candidates")):
        with pytest.raises(LakeError, match=f"{path} is missing"):
            use()
    assert problems(lake, ref) == {path: "is missing"}


def test_a_catalog_answers_like_the_lake_without_it(lake: Lake, root: str, tmp_path: Path) -> None:
    publish_candidates(lake, "a" * 12, 2)
    publish_candidates(lake, "b" * 12, 3)
    has_rows = write_catalog(lake, tmp_path / "x.duckdb")
    assert has_rows is root.startswith("s3://")
    with duckdb.connect(str(tmp_path / "x.duckdb"), read_only=True) as connection:
        for view in (*VIEWS, "candidates_versions"):
            sql = f"SELECT * FROM {view} ORDER BY ALL"
            assert connection.execute(sql).fetchall() == query(lake, sql).rows


def test_a_query_over_s3_spills_into_a_folder_that_goes_with_it(s3_root: str) -> None:
    with connect(Lake.open(s3_root)) as connection:
        (folder,) = connection.execute("SELECT current_setting('temp_directory')").fetchall()[0]
        assert Path(folder).is_dir()
    assert not Path(folder).exists()
