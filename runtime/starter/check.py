"""Measures what the starter promises: how good the policy is and how far its reward model can be trusted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.decoding.sampling import SamplingConfig
from runtime.models import load_classifier, load_policy
from runtime.records import Candidate, Progress, Prompt
from runtime.rewards.classifier import ClassifierReward
from runtime.starter.answers import as_prompt, sample_answers
from runtime.starter.examples import StarterSettings
from runtime.starter.problems import draw_question
from runtime.starter.rule import truth
from runtime.starter.s3d_recipe import acceptance_figures
from runtime.starter.training import draw_answer


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """How much to measure: prompts, samples per prompt, and the seed of both."""

    n_prompts: int = 300
    n_samples: int = 64
    n_pairs: int = 1000
    seed: int = 1


def check(folder: Path, settings: CheckSettings, on_progress: Progress | None = None) -> dict[str, float]:
    """Figures on fresh held-out prompts; a right answer has the right number in the style its group wants.

    pass@1 and best-of-N by the true rule, share of (right, wrong) pairs that the reward model ranks correctly, and
    Pearson correlation between its score of an answer cut at a third of the median length and of the finished answer;
    tokens per round of S3D (E) with its adapter.
    """
    rng = random.Random(f"check {settings.seed}")
    questions = [draw_question(rng, held_out=True) for _ in range(settings.n_prompts)]
    prompts = [as_prompt(f"check-{index}", question) for index, question in enumerate(questions)]
    policy = load_policy(str(folder / "policy"))
    reward = ClassifierReward(load_classifier(str(folder / "reward")), "chat")
    sampling = SamplingConfig(n=settings.n_samples, seed=settings.seed)
    answers = list(sample_answers(policy, prompts, sampling, on_progress=on_progress))
    return (
        _truth_figures(prompts, answers)
        | {"reward_pair_accuracy": _pair_accuracy(reward, settings, rng)}
        | _partial_figures(prompts, answers, reward, policy.tokenizer.decode)
        | acceptance_figures(folder, settings.seed)
    )


def _truth_figures(prompts: Sequence[Prompt], answers: Sequence[list[Candidate]]) -> dict[str, float]:
    right = np.array(
        [[truth(p, c.response) for c in candidates] for p, candidates in zip(prompts, answers, strict=True)]
    )  # (prompts, samples)
    lengths = np.array([c.n_tokens for candidates in answers for c in candidates])
    figures = {
        "pass_at_1": float(right.mean()),
        f"best_of_{right.shape[1]}": float(right.max(axis=1).mean()),
        "median_tokens": float(np.median(lengths)),
        "share_of_20_to_120_tokens": float(((lengths >= 20) & (lengths <= 120)).mean()),
    }
    for group in sorted({p.group for p in prompts}):
        rows = [index for index, p in enumerate(prompts) if p.group == group]
        figures[f"pass_at_1/{group}"] = float(right[rows].mean())
    return figures


def _pair_accuracy(reward: ClassifierReward, settings: CheckSettings, rng: random.Random) -> float:
    """Share of pairs (right answer, wrong answer to the same held-out prompt) with the right one scored higher."""
    recipe = StarterSettings()
    prompts: list[Prompt] = []
    responses: list[str] = []
    while len(prompts) < 2 * settings.n_pairs:
        question = draw_question(rng, held_out=True)
        drawn = {is_true: text for text, is_true in (draw_answer(question, recipe, rng) for _ in range(16))}
        if len(drawn) == 2:
            prompts += [as_prompt(f"check-{len(prompts)}", question)] * 2
            responses += [drawn[True], drawn[False]]
    scores = np.array([score.value for score in reward.score(prompts, responses)], dtype=float)
    return float((scores[0::2] > scores[1::2]).mean())


def _partial_figures(
    prompts: Sequence[Prompt],
    answers: Sequence[list[Candidate]],
    reward: ClassifierReward,
    decode: object,
) -> dict[str, float]:
    assert callable(decode)
    pairs = [(p, c) for p, candidates in zip(prompts, answers, strict=True) for c in candidates[:4]]
    third = int(np.median([c.n_tokens for _, c in pairs])) // 3
    pairs = [(p, c) for p, c in pairs if c.n_tokens > third]
    asked = [p for p, _ in pairs]
    whole = [score.value for score in reward.score(asked, [c.response for _, c in pairs])]
    part = [score.value for score in reward.score(asked, [decode(c.token_ids[:third]) for _, c in pairs])]
    correlation = np.corrcoef(np.array(whole, dtype=float), np.array(part, dtype=float))[0, 1]
    return {"partial_tokens": float(third), "partial_pearson": float(correlation)}
