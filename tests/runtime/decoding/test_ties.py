"""Draws that rounding would decide: a text is the same whatever was computed beside it."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.decoding import steps, ties
from runtime.decoding.s3d import rounds
from runtime.decoding.s3d.adapter import S3DAdapter
from runtime.decoding.s3d.rounds import S3DDecoding
from runtime.decoding.sampling import SamplingConfig, sample, sample_with_lead
from runtime.models import LoadedModel
from runtime.randomness import gumbel
from runtime.records import Candidate, Prompt

Decode = Callable[..., dict[tuple[str, int], Candidate]]
Shake = Callable[[float], None]


@pytest.fixture
def shake(monkeypatch: pytest.MonkeyPatch) -> Shake:
    """Make every pass of the engine add other noise to its logits, of a given size."""
    generator = torch.Generator().manual_seed(0)

    def install(size: float) -> None:
        original = steps.logits_of

        def logits_of(*args: Any) -> Tensor:
            logits = original(*args)
            return logits + size * torch.randn(logits.shape, generator=generator)

        monkeypatch.setattr(steps, "logits_of", logits_of)
        monkeypatch.setattr(rounds, "logits_of", logits_of)

    return install


@pytest.fixture(scope="module")
def twins(tiny_policy: LoadedModel) -> LoadedModel:
    """A policy for which tokens 2i and 2i + 1 are equally likely."""
    model = copy.deepcopy(tiny_policy.model)
    weight = model.get_output_embeddings().weight.detach().clone()
    weight[1::2] = weight[: 2 * (len(weight) // 2) : 2]
    model.get_output_embeddings().weight = torch.nn.Parameter(weight)
    return replace(tiny_policy, model=model.eval())


def _all(decode: Decode, policy: LoadedModel, prompts: Sequence[Prompt], **sampling: Any) -> list[dict[Any, Candidate]]:
    found = [decode(prompts, policy=policy, max_rows=rows, **sampling) for rows in (8, 20)]
    adapter = S3DAdapter.skip_only(policy, 1, 1, 4)
    return [*found, *(decode(prompts, policy=policy, s3d=S3DDecoding(adapter, k), **sampling) for k in (0, 1, 4))]


@pytest.mark.parametrize("sampling", [{"repetition_penalty": 1.2}])
def test_greedy_texts_of_equally_likely_tokens_do_not_depend_on_rounding(
    decode: Decode, twins: LoadedModel, tiny_prompts: Sequence[Prompt], shake: Shake, sampling: dict[str, Any]
) -> None:
    still = decode(tiny_prompts, policy=twins, n=2, temperature=0, **sampling)
    shake(1e-7)
    assert all(found == still for found in _all(decode, twins, tiny_prompts, n=2, temperature=0, **sampling))


def test_without_settling_rounding_would_decide(
    decode: Decode,
    twins: LoadedModel,
    tiny_prompts: Sequence[Prompt],
    shake: Shake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ties, "TOLERANCES", {})
    still = decode(tiny_prompts, policy=twins, temperature=0)
    shake(1e-7)
    assert all(found != still for found in _all(decode, twins, tiny_prompts, temperature=0))


@pytest.mark.parametrize("sampling", [{}, {"top_k": 20}, {"top_p": 0.9, "temperature": 0.5}])
def test_sampled_texts_are_settled_likewise(
    decode: Decode,
    tiny_policy: LoadedModel,
    tiny_prompts: Sequence[Prompt],
    shake: Shake,
    monkeypatch: pytest.MonkeyPatch,
    sampling: dict[str, Any],
) -> None:
    monkeypatch.setattr(ties, "TOLERANCES", {torch.float32: 0.05})  # so many are close
    still = decode(tiny_prompts, n=2, **sampling)
    shake(1e-4)
    assert all(found == still for found in _all(decode, tiny_policy, tiny_prompts, n=2, **sampling))


@pytest.mark.parametrize("n_vocabulary", [1, 7, 300, 9000])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0}, {"temperature": 2.0}, {"top_k": 3}, {"top_k": 1}])
def test_the_token_with_its_lead_is_the_token_without(n_vocabulary: int, sampling: dict[str, Any]) -> None:
    logits = 3 * torch.randn(20, n_vocabulary, generator=torch.Generator().manual_seed(1))
    keys, position, config = torch.arange(20), torch.arange(20) % 3, SamplingConfig(**sampling)
    tokens, lead = sample_with_lead(logits, keys, position, config)
    assert torch.equal(tokens, sample(logits, keys, position, config))
    assert bool((lead >= 0).all())


def test_the_lead_is_that_of_the_best_over_the_second_best_noisy_logit() -> None:
    logits = 3 * torch.randn(20, 50, generator=torch.Generator().manual_seed(1))
    keys, position = torch.arange(20), torch.zeros(20, dtype=torch.long)
    ordered = (logits / 0.5 + gumbel(keys, position, 50)).sort(dim=-1, descending=True).values
    lead = sample_with_lead(logits, keys, position, SamplingConfig(temperature=0.5))[1]
    torch.testing.assert_close(lead, (ordered[:, 0] - ordered[:, 1]) / (logits / 0.5).amax(dim=-1))


def test_nothing_is_settled_in_bfloat16(tiny_policy: LoadedModel) -> None:
    model = copy.deepcopy(tiny_policy.model).to(torch.bfloat16)
    assert ties.Ties(model, SamplingConfig()).tolerance is None
