"""Every on-policy method on a CUDA device: run with `pytest -m gpu`."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runtime.alignment.config import LoraSettings, Places
from runtime.alignment.online.loop import Task, train_online
from runtime.models import load_policy
from runtime.rewards.verifier import FunctionReward
from tests.runtime.alignment.online.test_loop import METHODS, PROMPTS, config, lower

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees"),
]


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_trains_on_a_gpu(
    method: str, lora: LoraSettings | None, tiny_policy_dir: Path, tmp_path: Path
) -> None:
    task = Task(PROMPTS, FunctionReward(lower, "test"), PROMPTS[:4], lower)
    settings = config(method, steps=2, eval_steps=1, save_steps=1, lora=lora)
    policy = load_policy(str(tiny_policy_dir), "float32", "cuda")
    report = train_online(policy, task, settings, Places(tmp_path, tmp_path / "work"))
    assert report.steps == len(report.curve("loss")) == 2
    assert all(math.isfinite(point.value) for point in report.points)
    first, last = load_file(tiny_policy_dir / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert any(not torch.equal(first[name], last[name]) for name in first)
