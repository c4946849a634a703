"""The whole chain with its lake in S3, killed half-way and run again, makes what it makes in a folder."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage.lake import Lake
from tests.servers.buckets import new_lake, use_endpoint
from tests.storage.conftest import ceph_url
from tests.storage.rows import problems
from tests.test_kill_and_resume import CONFIG

__all__ = ["ceph_url"]  # fixture


def _start(config: Path, lake: str, home: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flows.cli", "run", str(config), "--lake", lake, "--json"]
    environment = os.environ | {"PREFECT_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment.pop("PREFECT_API_URL", None)
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)


def _stages(process: subprocess.Popen[str]) -> list[str]:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    return [stage["ref"] for stage in json.loads(output)["stages"].values()]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_pipeline_over_s3_makes_the_same_shards(
    ceph_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_endpoint(monkeypatch, ceph_url)
    root, config = new_lake(tmp_path / "cache", monkeypatch), tmp_path / "config.toml"
    config.write_text(CONFIG)
    killed = _start(config, root, tmp_path / "prefect")
    lake = Lake.open(root)
    while killed.poll() is None and lake.find("candidates", "killed") is None:  # until `generate` has published
        pass
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()

    refs = _stages(_start(config, root, tmp_path / "prefect"))
    assert refs == _stages(_start(config, str(tmp_path / "lake"), tmp_path / "prefect"))
    local = Lake.open(str(tmp_path / "lake"))
    for text in refs:
        assert problems(lake, lake.resolve(text)) == {}
        both = [one.manifest(one.resolve(text)).files for one in (lake, local)]
        shards = [{file.path: file.sha256 for file in files if file.table} for files in both]
        assert shards[0] == shards[1]
