"""Answers for on-policy training: the rollout generator against a loop around transformers' generate.

    .venv/bin/python tests/benchmarks/bench_rollouts.py [--samples 16] [--prompt-tokens 256] [--prompts 8]

Both draw the same number of answers to the same prompts from the same weights, at temperature 1, and score none. The
loop asks for one prompt's answers at a time (num_return_sequences), and for all at once (padded on the left).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import medians, options, show
from starter_runs import Starter

from runtime.alignment.online.rollout import Drawing, Sampler
from runtime.models import LoadedModel, encode_prompt
from runtime.records import Message, Prompt
from runtime.rewards.verifier import FunctionReward


def main() -> None:
    settings = options(__doc__, samples=16, prompt_tokens=256, prompts=8, new=64, width=256, layers=8)
    sizes = {"hidden_size": settings.width, "num_hidden_layers": settings.layers}
    heads = {"num_attention_heads": settings.width // 32, "num_key_value_heads": max(1, settings.width // 64)}
    policy = Starter.random(settings.device, sizes | heads | {"intermediate_size": 4 * settings.width}).policy
    asked = _prompts(policy, settings)
    drawn: dict[str, int] = {}
    arms = _arms(policy, asked, settings, drawn)
    seconds = medians(arms, settings.repeats, settings.device)
    rows = [
        {
            "arm": name,
            "tokens": drawn[name],
            "tokens/s": drawn[name] / seconds[name],
            "x generate": drawn[name] / seconds[name] / (drawn["generate, a prompt"] / seconds["generate, a prompt"]),
        }
        for name in arms
    ]
    show("rollouts", settings, rows)


def _prompts(policy: LoadedModel, settings: argparse.Namespace) -> list[Prompt]:
    """As many tokens as asked for, each prompt different."""
    found = []
    for number in range(settings.prompts):
        text = f"{number} " * settings.prompt_tokens
        while len(encode_prompt(policy.tokenizer, [Message("user", text)], "chat")) > settings.prompt_tokens:
            text = text[: -max(1, len(text) // 50)]
        found.append(Prompt(str(number), (Message("user", text),), "all"))
    return found


def _arms(
    policy: LoadedModel, asked: Sequence[Prompt], settings: argparse.Namespace, drawn: dict[str, int]
) -> dict[str, Callable[[], None]]:
    drawing = Drawing(max_new_tokens=settings.new, max_rows=settings.samples * settings.prompts)
    sampler = Sampler(FunctionReward(lambda prompt, response: 0.0, "none"), drawing)

    def ours() -> None:
        rollout = sampler.draw(policy, asked, settings.samples, "bench")
        drawn["rollouts"] = sum(answer.n_tokens for answer in rollout.answers)

    return {
        "generate, a prompt": lambda: _generate(policy, asked, settings, drawn, "generate, a prompt", 1),
        "generate, all": lambda: _generate(policy, asked, settings, drawn, "generate, all", len(asked)),
        "rollouts": ours,
    }


def _generate(
    policy: LoadedModel,
    asked: Sequence[Prompt],
    settings: argparse.Namespace,
    drawn: dict[str, int],
    name: str,
    batch: int,
) -> None:
    model: Any = policy.model
    texts = [torch.tensor(encode_prompt(policy.tokenizer, p.messages, "chat")) for p in asked]
    end, n_tokens = policy.tokenizer.eos_token_id, 0
    limits = {"max_new_tokens": settings.new, "do_sample": True, "top_k": 0, "eos_token_id": end, "pad_token_id": end}
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        ids = torch.nn.utils.rnn.pad_sequence(part, True, 0, "left").to(model.device)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in part], True, 0, "left").to(ids.device)
        found = model.generate(ids, attention_mask=mask, num_return_sequences=settings.samples, **limits)
        answers = found[:, ids.shape[1] :]
        n_tokens += int((answers == end).long().cumsum(1).eq(0).sum()) + len(answers)
    drawn[name] = n_tokens


if __name__ == "__main__":
    main()
