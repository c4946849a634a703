"""Two processes on one machine train as one does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.alignment.trained import largest_difference

ROOT = Path(__file__).parents[3]


def _run(n_processes: int, module: str, *arguments: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(n_processes), "--master-addr", "127.0.0.1"]
    launched = [*launch, "--master-port", str(port)] if n_processes > 1 else []
    command = [sys.executable, *launched, "-m", f"tests.runtime.alignment.{module}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-4000:]


def _train(kind: str, model: Path, output: Path, n_processes: int) -> dict[str, object]:
    _run(n_processes, "trained", kind, str(model), str(output), "3", "0")
    found: dict[str, object] = json.loads((output / "report.json").read_text())
    return found


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("sft", "kto", "tdpo2")]


@pytest.mark.parametrize("kind", ["parallel", *SLOW])
def test_two_processes_train_as_one_with_twice_the_batches(kind: str, tiny_policy_dir: Path, tmp_path: Path) -> None:
    one = _train(f"{kind} alone", tiny_policy_dir, tmp_path / "one", 1)
    two = _train(kind, tiny_policy_dir, tmp_path / "two", 2)
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 1e-5
    assert one["tokens"] == two["tokens"]
    assert isinstance(one["points"], list) and isinstance(two["points"], list)
    assert len(one["points"]) == len(two["points"]) > 100
    for first, second in zip(one["points"], two["points"], strict=True):
        assert first[:4] == second[:4]
        assert first[4] == pytest.approx(second[4], abs=1e-4, rel=1e-4)
    weights = [point[4] for point in two["points"] if point[2:4] == ["child", "weight"]]
    assert len(set(weights)) == len(weights) == 8


@pytest.mark.slow
def test_losses_and_gradients_of_a_sharded_model_are_those_of_the_whole_one(
    tiny_policy_dir: Path, tmp_path: Path
) -> None:
    _run(2, "sharded", str(tiny_policy_dir), str(tmp_path / "found.txt"))
    found = [line.split() for line in (tmp_path / "found.txt").read_text().splitlines()]
    assert [name for name, *_ in found] == ["dpo", "tdpo2", "orpo", "reward"]
    for name, difference, largest in found:
        assert float(difference) < 1e-5 < 1e-2 < float(largest), name


@pytest.mark.slow
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
