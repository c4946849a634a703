"""A version is verified against what its manifest promises."""

import json
from pathlib import Path

import pytest

from storage.lake import DatasetRef, Lake
from storage.verify import verify
from tests.storage.rows import problems, publish_candidates


@pytest.fixture
def published(tmp_path: Path) -> tuple[Lake, DatasetRef]:
    lake = Lake.open(str(tmp_path))
    return lake, publish_candidates(lake, n_rows=20)


def test_an_untouched_version_has_no_problem(published: tuple[Lake, DatasetRef]) -> None:
    lake, ref = published
    assert problems(lake, ref) == {}
    assert {verdict.path for verdict in verify(lake, ref)} == {file.path for file in lake.manifest(ref).files}


def test_every_kind_of_damage_is_named(published: tuple[Lake, DatasetRef]) -> None:
    lake, ref = published
    shard = Path(ref.uri) / lake.manifest(ref).files[0].path
    name, whole = lake.manifest(ref).files[0].path, shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert problems(lake, ref) == {name: f"has {len(whole) - 1} bytes, the manifest says {len(whole)}"}
    shard.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    assert problems(lake, ref) == {name: "has another sha256 than the manifest says"}
    shard.unlink()
    assert problems(lake, ref) == {name: "is missing"}
    shard.write_bytes(whole)
    (Path(ref.uri) / "extra.bin").write_bytes(b"x")
    assert problems(lake, ref) == {"extra.bin": "is not in the manifest"}


def test_a_manifest_that_lies_about_rows_is_named(published: tuple[Lake, DatasetRef]) -> None:
    lake, ref = published
    path = Path(ref.uri) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][0]["rows"] = 7
    path.write_text(json.dumps(manifest))
    assert problems(lake, ref) == {manifest["files"][0]["path"]: "has 20 rows, the manifest says 7"}
