"""A head that tells masks what was drafted before them changes no candidate, whatever it says."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from runtime.decoding.s3d import rounds
from runtime.decoding.s3d.adapter import S3DAdapter, S3DConfig
from runtime.decoding.s3d.rounds import S3DDecoding
from runtime.models import LoadedModel, load_policy
from runtime.records import Candidate, Message, Prompt
from runtime.starter import path

Decode = Callable[..., dict[tuple[str, int], Candidate]]


def _with_head(policy: LoadedModel, n_first: int, n_last: int, k: int) -> S3DAdapter:
    """One whose head says something at random."""
    torch.manual_seed(0)
    config = S3DConfig(n_first, n_last, k, 0, 0.0, "embeddings", policy.content_hash, sampler_width=8)
    adapter = S3DAdapter(policy, config).to(policy.model.dtype).requires_grad_(False)
    assert adapter.sampler is not None
    adapter.sampler.up.normal_(std=0.1)
    return adapter


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {}, {"top_p": 0.8}, {"repetition_penalty": 1.3}, {"stop": ("a", "e")}]
)
@pytest.mark.parametrize("k", [1, 4])
def test_candidates_with_a_sampler_head_are_those_of_plain_decoding(
    decode: Decode, tiny_policy: LoadedModel, tiny_prompts: Sequence[Prompt], settings: dict[str, Any], k: int
) -> None:
    s3d = S3DDecoding(_with_head(tiny_policy, 1, 1, 4), k)
    assert decode(tiny_prompts, s3d=s3d, **settings) == decode(tiny_prompts, **settings)


def test_the_starter_draws_the_same_with_a_sampler_head(decode: Decode, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers but one draft, so that many drafts stay."""
    policy = load_policy(str(path("policy")), "float64")
    accepted: list[int] = []
    original = rounds.verify

    def verify(*args: Any) -> Any:
        accepted.extend(original(*args).accepted.tolist())
        return original(*args)

    monkeypatch.setattr(rounds, "verify", verify)
    asked = [Prompt(text, (Message("user", text),), "g") for text in ("What is 3 plus 4?", "1 + 2")]
    plain = decode(asked, policy=policy, n=4)
    assert decode(asked, policy=policy, n=4, s3d=S3DDecoding(_with_head(policy, 7, 1, 3), 3)) == plain
    assert {0, 1} <= set(accepted)
