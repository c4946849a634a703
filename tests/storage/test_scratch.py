"""Work in progress outlives a kill, is nobody else's while it runs, and goes when it is done."""

import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from storage.errors import LakeError
from storage.gc import collect
from storage.lake import DatasetRef, Lake
from storage.scratch import scratch
from tests.storage.rows import VERSION

HOLDER = """
import sys
from storage.lake import Lake
from storage.scratch import scratch
lake = Lake.open(sys.argv[1])
with scratch(lake, lake.ref("models", "demo", sys.argv[2])) as folder:
    (folder / "kept").write_text("x")
    print("ready", flush=True)
    sys.stdin.read()
"""


def _ref(lake: Lake) -> DatasetRef:
    return lake.ref("models", "demo", VERSION)


def test_a_folder_is_kept_by_an_error_found_again_and_removed_in_the_end(lake: Lake) -> None:
    with pytest.raises(ZeroDivisionError), scratch(lake, _ref(lake)) as folder:
        (folder / "kept").write_text("x")
        raise ZeroDivisionError
    with scratch(lake, _ref(lake)) as again:
        assert again == folder
        assert (again / "kept").read_text() == "x"
    assert not folder.exists()
    assert list(lake.store.list("")) == []
    assert lake.versions() == []


def test_two_versions_and_two_lakes_have_folders_of_their_own(lake: Lake, tmp_path: Path) -> None:
    other = Lake.open(str(tmp_path / "another"))
    with scratch(lake, _ref(lake)) as first, scratch(other, _ref(other)) as second:
        assert first != second
    with scratch(lake, lake.ref("models", "demo", "f" * 12)) as third:
        assert third != first


def test_a_folder_in_use_is_nobody_elses_and_gc_leaves_it(tmp_path: Path) -> None:
    lake = Lake.open(str(tmp_path / "lake"))
    command = [sys.executable, "-c", HOLDER, lake.root, VERSION]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        with scratch(lake, _ref(lake)) as own:
            assert list(own.iterdir()) == []
        assert not own.exists()
        later = datetime.now(UTC) + timedelta(days=9)
        assert list(collect(lake, timedelta(days=7), later, is_dry_run=False)) == []
        holder.kill()
    removed = {found.item.key.rpartition("/")[2] for found in collect(lake, timedelta(days=7), later, is_dry_run=False)}
    assert removed == {"kept", "lock"}


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_lake_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "lake").mkdir(mode=0o500)
    lake = Lake.open(str(tmp_path / "lake"))
    with pytest.raises(LakeError, match="cannot be written"), scratch(lake, _ref(lake)):
        pass
