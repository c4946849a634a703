"""kill -9 before every step of a writer: nothing half visible, and the next run ends in the same bytes."""

import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from storage.gc import collect
from storage.lake import Lake
from tests.servers.buckets import new_lake, use_endpoint
from tests.storage import killed
from tests.storage.rows import VERSION, problems

ROOT = Path(__file__).parents[2]
MOST_STEPS = 80


def _files(lake: Lake) -> dict[str, str]:
    """Path and sha256 of the published version's files; all of them are read."""
    ref = lake.resolve(f"models/demo@{VERSION}")
    assert problems(lake, ref) == {}
    return {file.path: file.sha256 for file in lake.manifest(ref).files}


def _kill_at_every_step(root: str) -> int:
    """Number of steps; each is a lake of its own below `root`."""
    undisturbed = Lake.open(f"{root}/undisturbed")
    killed.write(undisturbed)
    expected = _files(undisturbed)
    for when in range(1, MOST_STEPS):
        lake = Lake.open(f"{root}/{when}")
        command = [sys.executable, "-m", "tests.storage.killed", lake.root, str(when)]
        code = subprocess.run(command, cwd=ROOT, timeout=100).returncode
        if code == 0:
            assert _files(lake) == expected
            return when - 1
        assert code == -signal.SIGKILL
        for manifest in lake.manifests():  # nothing is visible, or all of it
            assert {file.path: file.sha256 for file in manifest.files} == expected
            assert _files(lake) == expected
        killed.write(lake)
        assert _files(lake) == expected
        # What the killed one left beside the version goes with gc, and nothing else does.
        list(collect(lake, timedelta(hours=1), datetime.now(UTC) + timedelta(days=1), is_dry_run=False))
        names = {path.removeprefix(f"models/demo/{VERSION}/") for path in lake.store.list("")}
        assert names == set(expected) | {"README.md", "manifest.json"}
        assert list(lake.store.unfinished()) == []
        assert _files(lake) == expected
    raise AssertionError("the writer never came to its end")


def test_a_writer_killed_at_every_step_ends_in_the_same_version(tmp_path: Path) -> None:
    # Three shards, one plain file, the mark, the card, the manifest.
    assert _kill_at_every_step(str(tmp_path)) == 7


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_writer_to_s3_killed_at_every_request_ends_in_the_same_version(
    ceph_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_endpoint(monkeypatch, ceph_url)
    assert _kill_at_every_step(new_lake(tmp_path / "cache", monkeypatch)) > 15
