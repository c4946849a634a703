"""Models fetched from remote lakes, and versions copied between lakes."""

from pathlib import Path

import pytest

from storage.copy import copy, copy_with_inputs
from storage.errors import LakeError
from storage.lake import Lake
from tests.storage.rows import VERSION, problems, publish_candidates, publish_model, put


def test_a_model_is_a_local_folder_wherever_the_lake_is(lake: Lake, tmp_path: Path) -> None:
    ref = publish_model(lake, tmp_path / "run")
    folder = lake.folder(ref, "model")
    assert (folder / "weights.bin").read_text() == "weights"
    assert (folder / "sub" / "config.json").read_text() == "{}"
    assert lake.folder(ref, "model") == folder


def test_a_fetched_model_is_checked_and_whole(s3_root: str, tmp_path: Path) -> None:
    lake = Lake.open(s3_root)
    ref = publish_model(lake, tmp_path / "run")
    folder = lake.folder(ref, "model")
    (folder / "weights.bin").write_text("shorter")
    (folder / "weights.bin").unlink()
    assert (lake.folder(ref, "model") / "weights.bin").read_text() == "weights"
    with pytest.raises(LakeError, match="has no files under elsewhere"):
        lake.folder(ref, "elsewhere")

    put(lake, f"{ref.prefix}/model/weights.bin", b"wrong!!")
    assert (lake.folder(ref, "model") / "weights.bin").read_text() == "weights"  # fetched before
    (folder / "weights.bin").unlink()
    with pytest.raises(LakeError, match=r"model/weights.bin is damaged"):
        lake.folder(ref, "model")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name.startswith(".fetch-")]


def test_two_lakes_with_other_content_under_one_version_are_not_mixed_up(s3_root: str, tmp_path: Path) -> None:
    one, other = Lake.open(f"{s3_root}/one"), Lake.open(f"{s3_root}/other")
    refs = [publish_model(one, tmp_path / "run", "one"), publish_model(other, tmp_path / "run", "other")]
    texts = [
        (lake.folder(ref, "model") / "weights.bin").read_text() for lake, ref in zip((one, other), refs, strict=True)
    ]
    assert texts == ["one", "other"]


@pytest.mark.parametrize("way", ["there", "back"])
def test_a_copy_is_the_same_version(lake: Lake, way: str, tmp_path: Path) -> None:
    local = Lake.open(str(tmp_path / "other"))
    source, target = (lake, local) if way == "there" else (local, lake)
    ref = publish_model(source, tmp_path / "run")
    first = copy(source, ref, target)
    assert (first.files_sent, first.is_new) == (2, True)
    assert problems(target, first.ref) == {}
    for key in source.store.list(""):
        assert target.store.read(key) == source.store.read(key)
    again = copy(source, ref, target)
    assert (again.files_sent, again.is_new) == (0, False)


def test_a_copy_goes_on_where_a_killed_one_was(lake: Lake, tmp_path: Path) -> None:
    source = Lake.open(str(tmp_path / "other"))
    ref = publish_model(source, tmp_path / "run")
    put(lake, f"{ref.prefix}/model/sub/config.json", b"{}")
    put(lake, f"{ref.prefix}/model/weights.bin", b"from another run")
    assert copy(source, ref, lake).files_sent == 1
    assert problems(lake, ref) == {}


def test_a_copy_never_replaces_other_content(lake: Lake, tmp_path: Path) -> None:
    source = Lake.open(str(tmp_path / "other"))
    ref = publish_model(source, tmp_path / "run", "one")
    publish_model(lake, tmp_path / "run", "other")
    with pytest.raises(LakeError, match="already, with other content"):
        copy(source, ref, lake)
    assert lake.store.read(f"{ref.prefix}/model/weights.bin") == b"other"


def test_a_copy_takes_its_inputs_along(lake: Lake, tmp_path: Path) -> None:
    target = Lake.open(str(tmp_path / "other"))
    publish_candidates(lake)
    ref = publish_model(lake, tmp_path / "run")
    copies = list(copy_with_inputs(lake, ref, target))
    assert [str(copied.ref) for copied in copies] == [f"candidates/demo@{VERSION}", f"models/demo@{VERSION}"]
    assert [copied.missing_inputs for copied in copies] == [(), ()]


def test_inputs_that_are_not_there_are_named(lake: Lake, tmp_path: Path) -> None:
    ref = publish_model(lake, tmp_path / "run")
    (copied,) = copy_with_inputs(lake, ref, Lake.open(str(tmp_path / "other")))
    assert copied.missing_inputs == (f"candidates/demo@{VERSION}",)
