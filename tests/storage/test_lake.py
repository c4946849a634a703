import json
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.catalog import query
from storage.errors import LakeError, QueryError, RefError, SchemaError
from storage.lake import DatasetRef, Lake, fingerprint
from storage.refs import parse_ref
from storage.schema import TABLES, checked, to_table
from storage.writer import Provenance, Shard
from tests.storage.rows import candidate, prompt, publish_candidates
from tests.storage.strategies import json_values

GOLDEN = Path(__file__).parent / "golden_schemas.txt"
VERSION = "0123456789ab"


def _publish(lake: Lake, version: str = VERSION, n_rows: int = 3, name: str = "demo") -> DatasetRef:
    writer = lake.writer("candidates", name, version)
    for index in range(2):
        rows = [candidate(f"p{index}-{i}", 0, float(i)) for i in range(n_rows)]
        writer.write(Shard("candidates", "train", index, 2), to_table("candidates", rows))
    return writer.commit(Provenance("generate", {"n": 1}, {"prompts": "prompts/demo@aaaaaaaaaaaa"}, {}, "winnow"))


@given(st.dictionaries(st.text(), json_values), st.text(), json_values)
def test_a_fingerprint_ignores_order_and_sees_every_value(values: dict[str, object], key: str, other: object) -> None:
    assert fingerprint(values) == fingerprint(dict(reversed(values.items())))
    changed = values | {key: other}
    # JSON does not tell True from 1 in Python's ==, but does in text.
    is_same = json.dumps(changed, sort_keys=True) == json.dumps(values, sort_keys=True)
    assert (fingerprint(changed) == fingerprint(values)) is is_same


@pytest.mark.parametrize("text", ["demo", "things/demo", "prompts/", "prompts/UPPER", "prompts/a@xyz", "prompts/../x"])
def test_a_malformed_reference_is_refused(text: str) -> None:
    with pytest.raises(RefError, match="reference"):
        parse_ref(text)


def test_the_schemas_are_the_golden_ones() -> None:
    shown = "\n\n".join(f"{name}\n{schema}" for name, schema in TABLES.items()) + "\n"
    if not GOLDEN.exists():
        GOLDEN.write_text(shown)
    assert shown == GOLDEN.read_text(), f"a schema changed: raise SCHEMA_VERSION, then delete {GOLDEN.name}"


def test_a_column_that_does_not_fit_is_named() -> None:
    with pytest.raises(SchemaError, match='column "group" is missing or unknown'):
        to_table("prompts", [{key: value for key, value in prompt().items() if key != "group"}])
    with pytest.raises(SchemaError, match='column "n_tokens" must be int32'):
        to_table("candidates", [candidate(n_tokens="two")])
    with pytest.raises(SchemaError, match='column "group" has 1 empty values'):
        to_table("prompts", [prompt() | {"group": None}])
    with pytest.raises(SchemaError, match='column "extra"'):
        checked("prompts", to_table("prompts", [prompt()]).append_column("extra", pa.array([1])))


def test_a_version_is_invisible_before_its_manifest(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    writer = lake.writer("candidates", "demo", VERSION)
    writer.write(Shard("candidates", "train", 0, 1), to_table("candidates", [candidate()]))
    assert lake.find("candidates", "demo") is None
    assert lake.manifests() == []
    writer.commit(Provenance("generate", {}, {}, {}, "winnow"))
    assert str(lake.find("candidates", "demo")) == f"candidates/demo@{VERSION}"


def test_a_published_version_reads_back_whole_and_in_order(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    ref = _publish(lake)
    ids = lake.read_table(ref, "candidates")["prompt_id"].to_pylist()
    assert ids == ["p0-0", "p0-1", "p0-2", "p1-0", "p1-1", "p1-2"]
    assert lake.read_table(ref, "preferences").num_rows == 0


def test_shards_of_a_killed_writer_are_taken_over(tmp_path: Path) -> None:
    lake, shard = Lake.open(str(tmp_path)), Shard("candidates", "train", 0, 1)
    lake.writer("candidates", "demo", VERSION).write(shard, to_table("candidates", [candidate()]))
    path = Path(lake.store.uri(f"candidates/demo/{VERSION}/{shard.path}"))
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    again = lake.writer("candidates", "demo", VERSION)
    assert again.has(shard)
    again.write(shard, to_table("candidates", [candidate()]))
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    again.commit(Provenance("generate", {}, {}, {}, "winnow"))
    assert lake.read_table(lake.resolve("candidates/demo"), "candidates").num_rows == 1


def test_a_damaged_shard_is_refused_by_name(tmp_path: Path) -> None:
    lake, shard = Lake.open(str(tmp_path)), Shard("candidates", "train", 0, 1)
    lake.store.create(f"candidates/demo/{VERSION}/{shard.path}", b"PAR1 half")
    with pytest.raises(LakeError, match="is damaged; delete that file"):
        lake.writer("candidates", "demo", VERSION).has(shard)


def test_two_writers_of_one_version_end_in_one_version(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    threads = [threading.Thread(target=_publish, args=(lake, VERSION, 50)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lake.manifests()) == 1
    assert lake.read_table(lake.resolve("candidates/demo"), "candidates").num_rows == 100
    assert not list((tmp_path / ".tmp").iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "ffffffffffff"}, "says it is candidates/demo@ffffffffffff"),
        ({"surprise": 1}, "is damaged"),
        ({"files": [{"path": "../../x", "sha256": "0" * 64, "size_bytes": 1}]}, "leads out of the version"),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    lake = Lake.open(str(tmp_path))
    ref = _publish(lake)
    path = Path(ref.uri) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(LakeError, match=message):
        lake.manifest(ref)


def test_an_unknown_reference_says_what_there_is(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    _publish(lake)
    with pytest.raises(RefError, match="it has candidates/demo"):
        lake.resolve("candidates/other")


def test_the_card_makes_the_version_loadable_with_datasets(tmp_path: Path) -> None:
    import datasets

    ref = _publish(Lake.open(str(tmp_path / "lake")))
    loaded = datasets.load_dataset(ref.uri, cache_dir=str(tmp_path / "cache"))
    assert loaded["train"].num_rows == 6
    assert loaded["train"][0]["cuts"] == [{"n_tokens": 1, "score": 0.5, "kept": True}]


def test_views_of_an_empty_lake_have_columns_and_no_rows(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    for view in (*TABLES, "groups", "cuts", "runs", "candidates_versions"):
        result = query(lake, f"SELECT * FROM {view}")
        assert result.columns
        assert result.rows == []


def test_views_show_the_latest_version_and_versions_all(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    _publish(lake, "a" * 12, 1)
    _publish(lake, "b" * 12, 2)
    assert query(lake, "SELECT DISTINCT version, COUNT(*) FROM candidates GROUP BY 1").rows == [("b" * 12, 4)]
    assert query(lake, "SELECT COUNT(*) FROM candidates_versions").rows == [(6,)]
    assert query(lake, "SELECT COUNT(*) FROM cuts WHERE kept").rows == [(4,)]
    assert query(lake, "SELECT stage, COUNT(*) FROM runs GROUP BY 1").rows == [("generate", 2)]
    assert query(lake, 'SELECT "group", prompts, candidates FROM groups').rows == [("child", 4, 4)]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('/etc/passwd')",
        "COPY (SELECT 1) TO '{folder}/out.csv'",
        "ATTACH '{folder}/x.duckdb'",
        "SET enable_external_access = true",
        "SELECT FROM WHERE",
    ],
)
def test_sql_reaches_nothing_but_the_views(tmp_path: Path, sql: str) -> None:
    before = list(tmp_path.iterdir())
    with pytest.raises(QueryError) as caught:
        query(Lake.open(str(tmp_path / "lake")), sql.replace("{folder}", str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == before


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_dataset_of_a_damaged_shard_is_refused_before_anything_is_read(tmp_path: Path, damage: str) -> None:
    lake = Lake.open(str(tmp_path))
    ref = publish_candidates(lake)
    assert lake.dataset(ref, "candidates").count_rows() == 3
    (shard,) = (Path(ref.uri) / "candidates").iterdir()
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "remove":
        shard.unlink()
    else:
        shard.write_bytes(data if damage == "flip" else data[:-9])
    with pytest.raises(LakeError, match="is missing" if damage == "remove" else "is damaged"):
        lake.dataset(ref, "candidates")
