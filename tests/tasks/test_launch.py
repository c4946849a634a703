"""Fine-tuning in several processes from the flow."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from storage.lake import Lake
from tasks import finetune
from tasks.errors import ConfigError
from tasks.settings import FinetuneConfig, PipelineConfig
from tests.runtime.alignment.trained import largest_difference
from tests.tasks.test_chain import config, run_chain

__all__ = ["config"]  # fixture


@pytest.fixture(scope="module")
def lake(config: PipelineConfig, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """A lake with pairs."""
    return run_chain(config, str(tmp_path_factory.mktemp("launch") / "lake"), until="assemble")


def _train(config: PipelineConfig, lake: Lake, **values: object) -> Path:
    settings = config.stage(FinetuneConfig(**config.finetune.model_dump() | values))
    ref = finetune.finetune.fn(finetune.prepare(settings, lake), lake.root)
    return lake.folder(ref, "model")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_train_the_model_of_one(config: PipelineConfig, lake: Lake, tmp_path: Path) -> None:
    # So that the pairs fill every batch: an incomplete one is filled up with pairs of its own.
    pairs = lake.read_table(lake.resolve("preferences/tiny"), "preferences").num_rows
    alone = _train(config, lake, batch_size=pairs // 2 * 2, epochs=4)
    first = lake.manifest(lake.resolve("models/tiny"))
    together = _train(config, lake, batch_size=pairs // 2 * 2, epochs=4, processes=2)
    second = lake.manifest(lake.resolve("models/tiny"))
    assert pairs % 2 == 0 and second.version != first.version
    assert largest_difference(alone, together) < 1e-5
    for key in ("steps", "pairs", "tokens", "dropped"):
        assert second.stats[key] == first.stats[key]


def test_a_batch_that_cannot_be_shared_is_refused_before_anything_starts(config: PipelineConfig, lake: Lake) -> None:
    with pytest.raises(ValidationError, match="processes = 2 cannot share batch_size = 3 evenly"):
        _train(config, lake, batch_size=3, processes=2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_mistake_in_a_process_is_the_one_line_it_would_be_here(config: PipelineConfig, lake: Lake) -> None:
    from runtime.errors import InputError

    # No pair fits; each process finds out by itself.
    with pytest.raises((ConfigError, InputError), match="no pair is left to train on"):
        _train(config, lake, processes=2, max_length=3)


LAUNCH = """
import sys, time
from pathlib import Path
from tasks import launch
launch._run(Path(sys.argv[1]), 2, lambda done, total: None, is_cpu=True)
"""


def alive(marker: str) -> list[int]:
    """Processes with this in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if marker in (entry / "cmdline").read_bytes().decode(errors="replace"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])  # killed, and told to end
def test_processes_end_with_the_one_that_started_them(tmp_path: Path, how: signal.Signals) -> None:
    work = tmp_path / "work-of-a-killed-one"
    os.mkfifo(tmp_path / "fifo")
    work.mkdir()
    # Reading the order blocks for ever: the processes are there, and do nothing.
    (work / "launch.json").symlink_to(tmp_path / "fifo")
    parent = subprocess.Popen([sys.executable, "-c", LAUNCH, str(work)], cwd=Path(__file__).parents[2])
    try:
        deadline = time.monotonic() + 120
        while len(alive(str(work))) < 4 and time.monotonic() < deadline:  # the parent, torchrun and two processes
            time.sleep(0.2)
        assert len(alive(str(work))) == 4
    finally:
        os.kill(parent.pid, how)
        parent.wait(timeout=60)
    deadline = time.monotonic() + 60
    while alive(str(work)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert alive(str(work)) == []
