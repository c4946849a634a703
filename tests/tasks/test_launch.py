"""Fine-tuning in several processes from the flow."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from storage.catalog import query
from storage.lake import Lake
from tasks import finetune
from tasks.errors import ConfigError
from tasks.settings import FinetuneConfig, PipelineConfig
from tests.runtime.alignment.trained import largest_difference
from tests.tasks.test_chain import config, run_chain
from tests.tasks.test_finetune import _publish, _run

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
def test_two_processes_train_the_model_of_one(tiny_policy_dir: Path, tmp_path: Path) -> None:
    found, stats, stored = [], [], []
    for processes in (1, 2):
        # An odd number of pairs, and four steps in each epoch: in the last one there is nothing for one of the two.
        lake = Lake.open(str(tmp_path / f"lake-{processes}"))
        _publish(lake, ("child", "clerk", "clerk", "child", "clerk", "child", "clerk"), ("child", "clerk") * 2)
        ref = _run(lake, tiny_policy_dir, method="gr_dpo", step_size=0.1, batch_size=2, processes=processes)
        found.append(lake.folder(ref, "model"))
        stats.append(lake.manifest(ref))
        sql = "SELECT prompt_id, chosen_logp FROM reference_logps_versions ORDER BY prompt_id"
        stored.append(query(lake, sql).rows)
    assert largest_difference(*found) < 1e-5
    assert stats[0].version != stats[1].version
    assert stats[0].stats["steps"] == 8
    for key in ("steps", "pairs", "tokens", "dropped"):
        assert stats[1].stats[key] == stats[0].stats[key]
    assert len(stored[0]) == len(stored[1]) == 7 + 4
    for (prompt, logp), (other_prompt, other_logp) in zip(*stored, strict=True):
        assert prompt == other_prompt and logp == pytest.approx(other_logp, abs=1e-4)


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
import signal, sys
from pathlib import Path
from tasks import launch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
launch._run(Path(sys.argv[1]), launch.Processes(2, threads=1, is_cpu=True), {})
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
        assert len(alive(str(work))) >= 4
    finally:
        os.kill(parent.pid, how)
        parent.wait(timeout=60)
    deadline = time.monotonic() + 60
    while alive(str(work)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert alive(str(work)) == []
