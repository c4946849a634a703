"""`winnow adapt`, then `generate` with what it made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage.lake import Lake
from tasks.settings import PipelineConfig
from tests.tasks.test_adapt import FEW, config, lake

__all__ = ["config", "lake"]  # fixtures

ROOT = Path(__file__).parents[2]
DRAWN = ("prompt_id", "candidate_index", "token_ids", "finish_reason")


def _run(stage: str, lake: Lake, home: Path, settings: dict[str, object]) -> str:
    """The reference that a command publishes."""
    options = [part for key, value in settings.items() for part in ("--set", f"{stage}.{key}={json.dumps(value)}")]
    command = [sys.executable, "-m", "flows.cli", stage, "--name", "tiny", "--lake", lake.root, "--json", *options]
    variables = os.environ | {"PREFECT_API_URL": "", "PREFECT_HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_adapter_from_the_command_line_drafts_for_its_policy(
    config: PipelineConfig, lake: Lake, tmp_path: Path
) -> None:
    model = config.generate.model
    _run("adapt", lake, tmp_path, {"model": model, "kept": ["1+1"], **FEW})
    assert lake.manifest(lake.resolve("models/tiny-s3d")).stats["kept"] == "1+1"
    plain = lake.read_table(lake.resolve("candidates/tiny"), "candidates")
    kept = {"n", "max_new_tokens", "shard_prompts", "max_rows"}
    settings = config.generate.model_dump(include=kept) | {"model": model, "cut_policy": "none"}
    _run("generate", lake, tmp_path, settings | {"s3d": "3", "s3d_adapter": "models/tiny-s3d"})
    drafted = lake.resolve("candidates/tiny")
    assert lake.manifest(drafted).config["s3d_adapter"] == "models/tiny-s3d"
    assert lake.manifest(drafted).inputs["s3d_adapter"] == str(lake.resolve("models/tiny-s3d"))
    assert lake.read_table(drafted, "candidates").select(DRAWN) == plain.select(DRAWN)
