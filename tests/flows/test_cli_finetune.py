"""`winnow finetune` from the command line: a training that goes wrong is one line and keeps what was good."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from storage.lake import Lake
from tests.tasks.test_chain import config, lake

__all__ = ["config", "lake"]  # fixtures

ROOT = Path(__file__).parents[2]


def _finetune(lake: Lake, home: Path, *values: str) -> subprocess.CompletedProcess[str]:
    options = [part for value in values for part in ("--set", f"finetune.{value}")]
    command = [sys.executable, "-m", "flows.cli", "finetune", "--name", "tiny", "--lake", lake.root, *options]
    variables = os.environ | {
        "PREFECT_API_URL": "",
        "PREFECT_HOME": str(home),
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_diverging_training_is_one_line_and_keeps_its_checkpoint(
    lake: Lake, tmp_path: Path, tiny_policy_dir: Path
) -> None:
    shutil.copytree(lake.root, tmp_path / "lake")
    copy = Lake.open(str(tmp_path / "lake"))
    known = {manifest.label for manifest in copy.manifests("models")}
    settings = (f'model="{tiny_policy_dir}"', 'method="ipo"', 'length_norm="sum"', "threads=1", "batch_size=4")
    done = _finetune(copy, tmp_path / "prefect", *settings, "epochs=40", "learning_rate=0.5", "save_steps=1")
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: the ")
    assert "lower learning_rate" in line
    kept = Path(line.rpartition("is kept in ")[2].rstrip(")"))
    assert (kept / "model.safetensors").is_file()
    assert kept.is_relative_to(tmp_path / "lake" / ".tmp" / "work")
    assert {manifest.label for manifest in copy.manifests("models")} == known


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_setting_that_cannot_work_is_one_line_with_exit_code_two(lake: Lake, tmp_path: Path) -> None:
    done = _finetune(lake, tmp_path / "prefect", 'method="gr_ipo"')
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ipo without length_norm; set ")
    done = _finetune(lake, tmp_path / "prefect", "beta=-1")
    assert done.returncode == 2
    assert "beta" in done.stderr.strip().splitlines()[-1]
