"""Shards on every task runner: the same bytes, a GPU for each worker, and the first failure ends it."""

import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from storage.lake import Lake
from tasks import generate, ingest
from tasks.errors import ConfigError
from tasks.runners import open_runner
from tasks.settings import GenerateConfig, IngestConfig, ScoreConfig
from tasks.settings_execution import ExecutionConfig
from tasks.stops import started

ROOT = Path(__file__).parents[2]
RUNNERS = [
    pytest.param("thread"),
    pytest.param("process", marks=pytest.mark.slow),
    pytest.param("dask", marks=[pytest.mark.slow, pytest.mark.long]),
    pytest.param("ray", marks=pytest.mark.slow),
]
PACKAGES = {"dask": "prefect_dask", "ray": "prefect_ray"}


def _with_prompts(root: Path) -> str:
    config = IngestConfig(name="spread", max_prompts=8, max_heldout=2)
    ingest.ingest.fn(ingest.prepare(config), str(root))
    return str(root)


def _config(policy: Path, reward: Path) -> GenerateConfig:
    values = {"name": "spread", "model": str(policy), "reward_model": str(reward), "threads": 1, "shard_prompts": 2}
    decoding = {"n": 4, "max_new_tokens": 16, "cut_tokens": [4], "cut_keep": [0.5]}
    return GenerateConfig.model_validate(values | decoding)


def _shards(root: str) -> dict[str, str]:
    files = Path(root).rglob("candidates/train-*.parquet")
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize("name", RUNNERS)
@pytest.mark.timeout(400)
def test_two_workers_make_the_dataset_of_one_process(
    prefect_server: None, name: str, tiny_policy_dir: Path, tiny_reward_dir: Path, tmp_path: Path
) -> None:
    from flows.generate import generate as flow
    from flows.score import score

    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"needs {PACKAGES[name]}: pip install 'winnow[{name}]'")
    config = _config(tiny_policy_dir, tiny_reward_dir)
    scoring = ScoreConfig(name="spread", reward_model=str(tiny_reward_dir), threads=1)
    execution = ExecutionConfig.model_validate({"task_runner": name, "workers": 2})
    spread, alone = _with_prompts(tmp_path / "spread"), _with_prompts(tmp_path / "alone")
    for root, how in ((spread, execution), (alone, ExecutionConfig())):
        flow(config, root, how)
        score(scoring, root, how)
    assert len(_shards(spread)) == 8
    assert _shards(spread) == _shards(alone)
    assert [m.label for m in Lake.open(spread).manifests()] == [m.label for m in Lake.open(alone).manifests()]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.timeout(400)
def test_the_progress_of_a_stage_tells_its_shards_and_their_tokens(
    prefect_server: None, workers: int, tiny_policy_dir: Path, tiny_reward_dir: Path, tmp_path: Path
) -> None:
    from prefect.client.orchestration import get_client

    from flows.generate import generate as flow

    root = _with_prompts(tmp_path / "lake")
    name = f"told-{workers}"
    config = _config(tiny_policy_dir, tiny_reward_dir).model_copy(update={"name": name, "prompts": "prompts/spread"})
    ref = flow(config, root, ExecutionConfig(workers=workers))
    n_tokens = Lake.open(root).read_table(ref, "candidates")["n_tokens"].to_pylist()
    with get_client(sync_client=True) as client:
        texts = [a.description for a in client.read_artifacts(limit=200) if a.key == f"{name}-shards-of-generate"]
    assert len(texts) == 1
    assert f"4 of 4 shards; {sum(n_tokens):,} tokens, " in str(texts[0])


@pytest.mark.parametrize("name", RUNNERS[:2])
@pytest.mark.timeout(400)
def test_a_shard_that_fails_fails_the_run_with_its_reason(
    prefect_server: None, name: str, tiny_policy_dir: Path, tiny_reward_dir: Path, tmp_path: Path
) -> None:
    from flows.generate import generate as flow

    # Nothing looks at the address before a shard does.
    broken = _config(tiny_policy_dir, tiny_reward_dir).model_copy(update={"server": "nowhere", "server_model": "m"})
    root = _with_prompts(tmp_path / "lake")
    execution = ExecutionConfig.model_validate({"task_runner": name, "workers": 2})
    with pytest.raises(ConfigError, match='server = "nowhere": write a URL'):
        flow(broken, root, execution)
    assert Lake.open(root).find("candidates", "spread") is None


def test_only_shards_that_are_missing_are_run(tiny_policy_dir: Path, tiny_reward_dir: Path, tmp_path: Path) -> None:
    from tasks.runners import missing_shards

    root = _with_prompts(tmp_path / "lake")
    step = generate.prepare(_config(tiny_policy_dir, tiny_reward_dir), Lake.open(root))
    assert missing_shards(step, root, 4) == [0, 1, 2, 3]
    generate.generate_shard.fn(step, root, 2, 4)
    assert missing_shards(step, root, 4) == [0, 1, 3]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_worker_processes_have_two_gpus(
    prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.flows.shards import place_of_shard

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    execution = ExecutionConfig(task_runner="process", workers=2, gpus=["0", "1"])
    runner = open_runner(execution)
    with started(runner):
        calls = [{"execution": execution, "seconds": 0.5} for _ in range(6)]
        places = [future.result() for future in [runner.submit(place_of_shard, call) for call in calls]]
    processes = {(pid, gpu) for pid, gpu, *_ in places}
    assert sorted(gpu for _, gpu in processes) == ["0", "1"]
    assert len({pid for pid, _ in processes} - {os.getpid()}) == 2


def _holders(folder: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[0]) for path in folder.iterdir())


def _wait(is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 200
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.1)
    return is_so()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])  # killed, and cancelled
def test_worker_processes_end_with_their_run_and_give_their_gpus_back(
    prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    from prefect.settings import PREFECT_API_URL

    held = tmp_path / "held"
    held.mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    variables = os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value() or "", "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-m", "tests.flows.shards", str(held)], cwd=ROOT, env=variables)
    assert _wait(lambda: len(_holders(held)) == 2)
    run.send_signal(how)
    assert run.wait(timeout=60) != 0
    assert _wait(lambda: not any(Path("/proc", str(pid)).exists() for pid in _holders(held)))
    heirs = [_holder(), _holder()]
    given = {heir.stdout.readline().strip() for heir in heirs if heir.stdout is not None}
    for heir in heirs:
        heir.kill()
        heir.communicate()
    assert given == {"0", "1"}


HOLD_GPU = """
import os, sys
from tasks.leases import use_gpu
use_gpu(["0", "1"])
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.read()
"""


def _holder() -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", HOLD_GPU], cwd=ROOT, **pipes)  # type: ignore[call-overload, no-any-return]


def test_every_worker_process_gets_a_gpu_of_its_own_and_a_dead_one_gives_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    first, second = _holder(), _holder()
    assert first.stdout is not None and second.stdout is not None
    given = {first.stdout.readline().strip(), second.stdout.readline().strip()}
    assert given == {"0", "1"}
    waiting = _holder()
    assert waiting.stdout is not None
    first.kill()
    freed = waiting.stdout.readline().strip()  # blocks until the kernel has ended the killed one's lease
    assert freed in given
    for process in (first, second, waiting):
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"task_runner": "thread", "workers": 2, "gpus": ["0", "1"]}, "threads share one process and its GPU"),
        ({"task_runner": "process", "workers": 3, "gpus": ["0"]}, "give each worker one"),
        ({"address": "tcp://h:1"}, "is for dask or ray"),
        ({"gpus": ["0", "0"]}, "names one twice"),
        ({"workers": 0}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_work_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ExecutionConfig.model_validate(values)
