"""S3D on trained models: the policy's bits with an adapter attached, and how much the shipped adapter foresees."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutSchedule
from runtime.decoding.s3d import rounds
from runtime.decoding.s3d.adapter import S3DAdapter, S3DConfig, load_adapter
from runtime.decoding.s3d.rounds import S3DDecoding
from runtime.decoding.sampling import SamplingConfig
from runtime.models import LoadedModel, load_policy
from runtime.records import Message, Prompt
from runtime.starter import path, prompts_path, s3d_path


def starter_prompts(count: int) -> list[Prompt]:
    """The first of the starter's problems."""
    rows = [json.loads(line) for line in prompts_path().read_text().splitlines()[:count]]
    return [Prompt(str(i), (Message("user", row["messages"][0]["content"]),), "g") for i, row in enumerate(rows)]


def trained(policy: LoadedModel) -> S3DAdapter:
    """An adapter whose weights all say something."""
    torch.manual_seed(0)
    adapter = S3DAdapter(policy, S3DConfig(1, 1, 4, 8, 8.0, "lora", policy.content_hash)).to(policy.model.dtype)
    with torch.no_grad():
        for weights in adapter.parameters():
            weights.normal_(std=0.3)
    return adapter


@torch.inference_mode()
def logits(policy: LoadedModel) -> Tensor:
    """Of a few texts, without arena or cache."""
    torch.manual_seed(1)
    return policy.model(torch.randint(3, int(policy.model.config.vocab_size), (3, 40))).logits


def assert_same_bits(folder: Path, adapter_of: Callable[[LoadedModel], S3DAdapter], dtype: str) -> None:
    """Before anything of ours touched the model, and after it drafted for itself."""
    pristine = logits(load_policy(str(folder), dtype))
    policy = load_policy(str(folder), dtype)
    sampling = SamplingConfig(n=4, max_new_tokens=12)
    s3d = S3DDecoding(adapter_of(policy), 4)
    engine = Engine(policy, sampling, CutSchedule(), None, 8, "text", s3d=s3d)
    answers = list(engine.generate(starter_prompts(3)))
    assert {c.status for each in answers for c in each} == {"ok"}
    assert torch.equal(logits(policy), pristine)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_starter_computes_the_same_bits_with_its_adapter(dtype: str) -> None:
    assert_same_bits(path("policy"), lambda policy: load_adapter(s3d_path(), policy), dtype)


@pytest.mark.shared
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_of_stories_computes_the_same_bits_with_an_adapter(shared_models: Path, dtype: str) -> None:
    assert_same_bits(shared_models / "stories3m", trained, dtype)


def test_the_shipped_adapter_gives_enough_tokens_per_round(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(str(path("policy")))
    emitted: list[int] = []
    original = rounds.verify

    def verify(*args: Any) -> Any:
        verdict = original(*args)
        whole = args[0].limits == verdict.tokens.shape[1]  # rows that could have got all
        emitted.extend(verdict.counts[whole].tolist())
        return verdict

    monkeypatch.setattr(rounds, "verify", verify)
    s3d = S3DDecoding(load_adapter(s3d_path(), policy), 4)
    engine = Engine(policy, SamplingConfig(n=2, max_new_tokens=48), CutSchedule(), None, 40, s3d=s3d)
    assert len(list(engine.generate(starter_prompts(20)))) == 20
    assert len(emitted) > 300
    assert sum(emitted) / len(emitted) >= 2.2
