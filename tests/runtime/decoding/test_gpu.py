"""The engine on a GPU draws what it draws on a CPU; needs one: `pytest -m gpu`."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutSchedule
from runtime.decoding.s3d.adapter import S3DAdapter
from runtime.decoding.s3d.rounds import S3DDecoding
from runtime.decoding.sampling import SamplingConfig
from runtime.models import load_classifier, load_policy
from runtime.records import Candidate, Prompt
from runtime.rewards.classifier import ClassifierReward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees"),
]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("cuts", [CutSchedule(), CutSchedule((4, 10), (0.5, 0.5))])
def test_a_gpu_draws_the_same_candidates(
    tiny_policy_dir: Path, tiny_reward_dir: Path, tiny_prompts: Sequence[Prompt], cuts: CutSchedule, top_p: float
) -> None:
    def draw(device: str) -> list[list[Candidate]]:
        policy = load_policy(str(tiny_policy_dir), "float64", device)
        reward = ClassifierReward(load_classifier(str(tiny_reward_dir), "float64", device))
        sampling = SamplingConfig(n=8, max_new_tokens=40, top_p=top_p)
        return list(Engine(policy, sampling, cuts, reward, 16).generate(tiny_prompts))

    for one, other in zip(sum(draw("cpu"), []), sum(draw("cuda"), []), strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)


@pytest.mark.parametrize("k", [0, 1, 4, None])
@pytest.mark.parametrize("cuts", [CutSchedule(), CutSchedule((4, 10), (0.5, 0.5))])
def test_s3d_on_a_gpu_draws_the_same_candidates(
    tiny_policy_dir: Path, tiny_reward_dir: Path, tiny_prompts: Sequence[Prompt], cuts: CutSchedule, k: int | None
) -> None:
    policy = load_policy(str(tiny_policy_dir), "float64", "cuda")
    reward = ClassifierReward(load_classifier(str(tiny_reward_dir), "float64", "cuda"))
    sampling = SamplingConfig(n=8, max_new_tokens=40)
    s3d = S3DDecoding(S3DAdapter.skip_only(policy, 2, 2, 4), k, clock=time.perf_counter)
    plain = list(Engine(policy, sampling, cuts, reward, 16).generate(tiny_prompts))
    found = list(Engine(policy, sampling, cuts, reward, 16, s3d=s3d).generate(tiny_prompts))
    for one, other in zip(sum(plain, []), sum(found, []), strict=True):
        assert (one.token_ids, one.finish_reason, one.cut_at_token) == (
            other.token_ids,
            other.finish_reason,
            other.cut_at_token,
        )
