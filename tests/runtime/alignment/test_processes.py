"""Two processes on one machine train as one does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.alignment.trained import SHARED, largest_difference

ROOT = Path(__file__).parents[3]


def _run(n_processes: int, module: str, *arguments: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(n_processes), "--master-addr", "127.0.0.1"]
    launched = [*launch, "--master-port", str(port)] if n_processes > 1 else []
    command = [sys.executable, *launched, "-m", f"tests.runtime.alignment.{module}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def _assert_equal_trainings(one: Path, two: Path) -> None:
    """Weights, tokens and figures, but for the order in which numbers were added up."""
    assert largest_difference(one, two) < 1e-5
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (one, two))
    assert first["tokens"] == second["tokens"]
    assert len(first["points"]) == len(second["points"]) > 100
    for a, b in zip(first["points"], second["points"], strict=True):
        assert a[:4] == b[:4]
        # The rate begins at 0: up to the second step rewards are 0 but for rounding, which says which one is larger.
        assert (a[0] <= 2 and "accuracies" in a[3]) or a[4] == pytest.approx(b[4], abs=1e-4, rel=1e-4), a
    weights = [point[4] for point in second["points"] if point[2:4] == ["child", "weight"]]
    assert len(set(weights)) == len(weights) == len({point[0] for point in second["points"]}) >= 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_as_one_with_twice_the_batch(tiny_policy_dir: Path, tmp_path: Path) -> None:
    _run(1, "trained", "dpo by one", str(tiny_policy_dir), str(tmp_path / "one"), "3", "0")
    _run(2, "trained", "dpo by two", str(tiny_policy_dir), str(tmp_path / "two"), "3", "0")
    _assert_equal_trainings(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_as_one_whatever_the_method(tiny_policy_dir: Path, tmp_path: Path) -> None:
    for count, name in ((1, "one"), (2, "two")):
        _run(count, "trained", f"by {name}", str(tiny_policy_dir), str(tmp_path / name), "3", "0")
    for kind in SHARED:
        _assert_equal_trainings(tmp_path / "one" / kind, tmp_path / "two" / kind)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["dpo", "lora"])
def test_a_model_that_fsdp2_shards_is_trained_and_written_as_the_whole_one(
    kind: str, tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(1, "trained", f"{kind} by one", str(tiny_policy_dir), str(tmp_path / "one"), "0", "0")
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    _run(2, "trained", f"{kind} by two", str(tiny_policy_dir), str(tmp_path / "two"), "3", "0")
    _assert_equal_trainings(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_losses_and_gradients_of_a_sharded_model_are_those_of_the_whole_one(
    tiny_policy_dir: Path, tmp_path: Path
) -> None:
    _run(2, "sharded", str(tiny_policy_dir), str(tmp_path / "found.txt"))
    found = [line.split() for line in (tmp_path / "found.txt").read_text().splitlines()]
    assert [name for name, *_ in found] == ["dpo", "tdpo2", "orpo", "reward"]
    for name, difference, largest in found:
        assert float(difference) < 1e-5 < 1e-2 < float(largest), name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_draw_and_learn_as_one(tiny_policy_dir: Path, tmp_path: Path) -> None:
    methods = ("grpo", "grpo uneven", "ppo", "remax", "jbond", "bond")
    _run(1, "aligned", str(tiny_policy_dir), str(tmp_path / "one"), *methods)
    _run(2, "aligned", str(tiny_policy_dir), str(tmp_path / "two"), *methods)
    for method in methods:
        one, two = tmp_path / "one" / method, tmp_path / "two" / method
        assert largest_difference(one, two) < 1e-5, method
        first, second = (json.loads((run / "report.json").read_text()) for run in (one, two))
        assert first["n_tokens"] == second["n_tokens"] > 100
        assert first["shown"] == [s | {"reward": pytest.approx(s["reward"])} for s in second["shown"]]
        for a, b in zip(first["points"], second["points"], strict=True):
            assert a == b | {"value": pytest.approx(b["value"], abs=1e-4, rel=1e-3)}, method
        assert (two / "work" / "checkpoint-2").is_dir()
