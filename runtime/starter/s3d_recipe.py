"""The starter's S3D adapter: trained on what the shipped policy says to problems of the training text."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from runtime.alignment.s3d_acceptance import Acceptance, draft_share, measure
from runtime.alignment.s3d_training import S3DTraining, Sample, train_s3d
from runtime.decoding.s3d.adapter import S3DAdapter, load_adapter
from runtime.decoding.sampling import SamplingConfig
from runtime.models import LoadedModel, encode_prompt, load_policy
from runtime.starter.answers import as_prompt, sample_answers
from runtime.starter.examples import StarterSettings
from runtime.starter.problems import draw_question

N_ANSWERS = 4  # per problem
MAX_ROWS = 128
N_MEASURED = 50  # problems


def build_adapter(folder: Path, settings: StarterSettings, report: Callable[[str, int, float], None]) -> None:
    """Train the adapter of the policy in `folder`/policy and write it to `folder`/s3d."""
    policy = load_policy(str(folder / "policy"))
    samples = draw_samples(policy, settings.s3d_prompts, held_out=False, seed=settings.seed)
    adapter = train_s3d(policy, samples, training(settings), lambda done, _: report("s3d", done, 0.0))
    adapter.knows(_measure(policy, adapter, settings.seed).coupled.rates)
    adapter.save(folder / "s3d")


def acceptance_figures(folder: Path, seed: int) -> dict[str, float]:
    """Tokens per round of the adapter in `folder`/s3d at temperature 1 on answers to fresh held-out problems."""
    policy = load_policy(str(folder / "policy"))
    adapter = load_adapter(folder / "s3d", policy)
    found = _measure(policy, adapter, seed)
    return {
        "s3d_tokens_per_round": found.coupled.emitted[-1],
        "s3d_tokens_per_round_classic": found.classic.emitted[-1],
        "s3d_draft_share": draft_share(policy.model, adapter),
        **{f"s3d_overlap_{offset}": share for offset, share in enumerate(found.overlap, start=1)},
        **{f"s3d_rate_{offset}": share for offset, share in enumerate(found.coupled.rates, start=1)},
    }


def _measure(policy: LoadedModel, adapter: S3DAdapter, seed: int) -> Acceptance:
    held_out = draw_samples(policy, N_MEASURED, held_out=True, seed=seed)
    return measure(policy, adapter, held_out, S3DTraining(k=adapter.config.k, seed=seed))


def training(settings: StarterSettings) -> S3DTraining:
    """One layer at either end: what is foreseen beyond them is not worth the time of another layer."""
    return S3DTraining(n_first=1, n_last=1, k=4, rank=16, alpha=16.0, steps=settings.s3d_steps, seed=settings.seed)


def draw_samples(policy: LoadedModel, n_prompts: int, held_out: bool, seed: int) -> list[Sample]:
    """The policy's answers at temperature 1 to fresh problems, from the held-out ones or from all others."""
    rng = random.Random(f"s3d {seed}")
    questions = [draw_question(rng, held_out) for _ in range(n_prompts)]
    prompts = [as_prompt(f"s3d-{index}", question) for index, question in enumerate(questions)]
    drawn = sample_answers(policy, prompts, SamplingConfig(n=N_ANSWERS, seed=seed), MAX_ROWS)
    found = []
    for prompt, answers in zip(prompts, drawn, strict=True):
        ids = encode_prompt(policy.tokenizer, prompt.messages, "chat")
        found += [Sample((*ids, *answer.token_ids), len(ids)) for answer in answers]
    return found
