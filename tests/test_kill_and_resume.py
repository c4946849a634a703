"""A pipeline killed at random moments and started again ends in the same shards as an undisturbed one."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CONFIG = """
name = "killed"
[ingest]
max_prompts = 12
max_heldout = 6
[generate]
threads = 1
n = 4
shard_prompts = 3
s3d = "auto"
max_new_tokens = 96
[score]
threads = 1
[finetune]
threads = 1
epochs = 1
[evaluate]
threads = 1
samples = 2
"""


def _start(config: Path, lake: Path, home: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "flows.cli", "run", str(config), "--lake", str(lake), "--json"]
    environment = os.environ | {"PREFECT_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment.pop("PREFECT_API_URL", None)
    with (home.parent / "log").open("ab") as log:
        # Its own session, so that the ephemeral Prefect server dies with it.
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _shards(lake: Path) -> dict[str, str]:
    files = (file for file in lake.rglob("*.parquet") if ".tmp" not in file.parts)
    return {str(file.relative_to(lake)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("n_kills", [4, pytest.param(10, marks=pytest.mark.long)])
def test_a_pipeline_killed_at_random_moments_ends_in_identical_shards(tmp_path: Path, n_kills: int) -> None:
    config, home = tmp_path / "config.toml", tmp_path / "prefect"
    config.write_text(CONFIG)
    home.mkdir()
    started = time.monotonic()
    undisturbed = _start(config, tmp_path / "undisturbed", home)
    assert undisturbed.wait(timeout=600) == 0, (tmp_path / "log").read_text()
    duration = time.monotonic() - started

    expected = _shards(tmp_path / "undisturbed")
    rng = random.Random(n_kills)
    n_killed, lake = 0, tmp_path / "killed-0"
    while n_killed < n_kills:
        fresh, started = not lake.exists(), time.monotonic()
        process = _start(config, lake, home)
        try:
            code = process.wait(timeout=rng.uniform(0.3, 0.95) * duration)
        except subprocess.TimeoutExpired:
            _kill(process)
            n_killed += 1
            continue
        # What was left to do took less time than was given: this lake is complete, the next kills get a new one.
        assert code == 0, (tmp_path / "log").read_text()
        if fresh:
            # The undisturbed run set up Prefect's database too and was slower; kills must not come after the end.
            duration = min(duration, time.monotonic() - started)
        assert _shards(lake) == expected
        lake = tmp_path / f"killed-{n_killed}"
    last = _start(config, lake, home)
    assert last.wait(timeout=600) == 0, (tmp_path / "log").read_text()
    assert _shards(lake) == expected
