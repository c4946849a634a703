import json
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from storage.errors import LakeError, RefError
from storage.lake import DatasetRef, Lake
from storage.manifest import FileEntry, Manifest, parse_manifest
from storage.schema import SCHEMA_VERSION
from tests.storage.rows import publish_candidates
from tests.storage.strategies import json_values

REF = DatasetRef("candidates", "demo", "0123456789ab", "/lake/candidates/demo/0123456789ab")
parts = st.from_regex(r"[a-zA-Z0-9_-][a-zA-Z0-9._ -]{0,12}", fullmatch=True)
paths = st.lists(parts, min_size=1, max_size=4).map("/".join)
entries = st.builds(
    FileEntry,
    path=paths,
    sha256=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
    size_bytes=st.integers(0, 2**40),
    rows=st.none() | st.integers(0, 2**40),
    table=st.none() | st.just("candidates"),
    split=st.none() | st.just("train"),
)
manifests = st.builds(
    Manifest,
    kind=st.just(REF.kind),
    name=st.just(REF.name),
    version=st.just(REF.version),
    stage=st.text(max_size=8),
    created_at=st.datetimes(timezones=st.just(UTC)),
    schema_version=st.integers(0, SCHEMA_VERSION),
    config=st.dictionaries(st.text(max_size=8), json_values, max_size=3),
    inputs=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
    stats=st.dictionaries(st.text(max_size=8), json_values, max_size=3),
    command=st.text(max_size=8),
    files=st.lists(entries, max_size=3).map(tuple),
)


@given(manifests)
def test_a_manifest_survives_the_way_through_its_file(manifest: Manifest) -> None:
    assert parse_manifest(manifest.model_dump_json(indent=2).encode(), REF) == manifest


@given(st.text() | st.lists(st.sampled_from(["..", ".", "", "a", "~", "C:", "\\", "\0", "\n"])).map("/".join))
def test_no_path_of_a_manifest_leads_out_of_its_version(path: str) -> None:
    try:
        entry = FileEntry(path=path, sha256="0" * 64, size_bytes=0)
    except ValidationError:
        return
    assert entry.path == PurePosixPath(path).as_posix()
    assert (Path(REF.uri) / entry.path).resolve().is_relative_to(REF.uri)
    assert Path(REF.uri) / entry.path != Path(REF.uri)


@pytest.mark.parametrize(
    "path", ["", ".", "..", "/etc/passwd", "a/../../b", "a//b", "a/", "./a", "a\\b", "a\0b", "a\nb"]
)
def test_a_hostile_path_is_refused(path: str) -> None:
    with pytest.raises(ValidationError, match="leads out of the version"):
        FileEntry(path=path, sha256="0" * 64, size_bytes=0)


def _rewrite(ref: DatasetRef, **change: object) -> None:
    path = Path(ref.uri) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"created_at": "2026-01-01T00:00:00"}, "is damaged .created_at"),
        ({"schema_version": SCHEMA_VERSION + 1}, "was written by a newer Winnow"),
        ({"files": [{"path": "a", "sha256": "short", "size_bytes": 1}]}, "is damaged .files.0.sha256"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_one_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    lake = Lake.open(str(tmp_path))
    publish_candidates(lake, "a" * 12)
    _rewrite(publish_candidates(lake, "b" * 12), **change)
    with pytest.raises(LakeError, match=message) as caught:
        lake.manifests()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"null", b"[]", b"[" * 50_000])
def test_a_manifest_that_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(LakeError, match="is damaged"):
        parse_manifest(data, REF)


def test_a_file_that_a_manifest_lists_and_is_gone_is_named(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    ref = publish_candidates(lake)
    _rewrite(ref, files=[{**lake.manifest(ref).files[0].model_dump(), "path": "candidates/gone.parquet"}])
    with pytest.raises(LakeError, match="gone.parquet"):
        lake.read_table(ref, "candidates")


def test_a_version_that_is_none_is_refused_before_any_path_is_made(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    for version in ("", "../../../etc", "0123456789AB", "0123456789abc", "0123456789ab\n"):
        with pytest.raises(RefError, match="12 hexadecimal digits"):
            lake.writer("candidates", "demo", version)
    with pytest.raises(LakeError, match="leads out of the lake"):
        lake.manifest(DatasetRef("..", "..", "etc", "/etc"))
    assert list(tmp_path.iterdir()) == []


def test_the_newest_version_is_the_latest_and_manifests_are_in_order(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path))
    refs = [publish_candidates(lake, version * 12) for version in "cab"]
    _rewrite(refs[0], created_at=datetime(2999, 1, 1, tzinfo=UTC).isoformat())
    assert [manifest.version[0] for manifest in lake.manifests("candidates")] == ["a", "b", "c"]
    assert str(lake.resolve("candidates/demo")) == f"candidates/demo@{'c' * 12}"
