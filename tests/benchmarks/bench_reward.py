"""Partial scores over four halving rounds: the reward model with its keys kept, against scoring from scratch.

    .venv/bin/python tests/benchmarks/bench_reward.py [--n 64] [--prompt 256] [--device cuda]

A random Llama classifier of about 15M parameters; answers grow by `--step` tokens per round and half of them leave
after each. From scratch is what this project does for rewards that cannot keep anything, prompt shared; "without
sharing" computes the prompt for every answer, as published.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from bench_engine import MODELS
from harness import medians, options, show
from transformers import LlamaConfig, LlamaForSequenceClassification

from runtime.models import LoadedModel, load_policy
from runtime.records import Message, Prompt
from runtime.rewards import batches
from runtime.rewards.classifier import ClassifierReward
from runtime.rewards.protocol import RescoringSession, RewardSession
from runtime.starter import path

ROUNDS = 4


def main() -> None:
    settings = options(__doc__, n=64, prompt=256, step=32)
    tokenizer = load_policy(str(path("policy"))).tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(**MODELS["15m"], vocab_size=32_000, num_labels=1, max_position_embeddings=4096, pad_token_id=0)
    model = LlamaForSequenceClassification(config).eval().to(settings.device)
    reward = ClassifierReward(LoadedModel(model, tokenizer, str(Path("random")), ""))
    words = [str(number) for number in range(100)]
    rng = random.Random(0)
    prompt = Prompt("p", (Message("user", " ".join(rng.choices(words, k=settings.prompt))),), "g")
    texts = [[" ".join(rng.choices(words, k=ROUNDS * settings.step)) for _ in range(settings.n)]][0]

    def rounds(session: RewardSession) -> list[float]:
        alive, found = list(range(settings.n)), []
        for number in range(1, ROUNDS + 1):
            so_far = [" ".join(texts[row].split()[: number * settings.step]) for row in alive]
            session.extend(alive, [[0]] * len(alive), so_far)
            scores = [float(score.value or 0.0) for score in session.scores(alive)]
            found += scores
            alive = alive[: max(1, len(alive) // 2)]
            session.keep(alive)
        return found

    def unshared() -> list[float]:
        least, batches.MIN_SHARING_ROWS = batches.MIN_SHARING_ROWS, 1_000_000
        try:
            return rounds(RescoringSession(reward, [prompt] * settings.n))
        finally:
            batches.MIN_SHARING_ROWS = least

    arms: dict[str, Callable[[], object]] = {
        "keys kept": lambda: rounds(reward.start([prompt] * settings.n)),
        "from scratch": lambda: rounds(RescoringSession(reward, [prompt] * settings.n)),
        "from scratch, without sharing": unshared,
    }
    kept, scratch = rounds(reward.start([prompt] * settings.n)), unshared()
    print(f"largest difference of a score: {max(abs(a - b) for a, b in zip(kept, scratch, strict=True)):.2g}")
    found = medians(arms, settings.repeats, settings.device)
    show("reward", settings, [{"arm": arm, "seconds": s, "x kept": s / found["keys kept"]} for arm, s in found.items()])


if __name__ == "__main__":
    main()
