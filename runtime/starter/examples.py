"""The starter's recipe as numbers, and the form in which text meets the two models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedTokenizerFast

IGNORED = -100
POOL_SIZE = 2048  # examples drawn at once, so that batches can be sorted by length


@dataclass(frozen=True, slots=True)
class StarterSettings:
    """Everything that determines the starter; the defaults are the shipped one."""

    seed: int = 7
    hidden_size: int = 128
    intermediate_size: int = 384
    n_layers: int = 8
    n_reward_layers: int = 3  # on top of the policy's
    n_heads: int = 4
    n_kv_heads: int = 2
    max_length: int = 256
    slip_rate: float = 0.07
    style_rate: float = 0.72
    policy_tokens: int = 10_000_000
    reward_tokens: int = 4_000_000
    policy_batch_tokens: int = 4096
    reward_batch_tokens: int = 1024  # the comparison is found after some hundred steps, however large
    policy_learning_rate: float = 3e-3
    reward_learning_rate: float = 2e-3
    # What the reward model is trained on: more slips, half of them to any number, fewer foreign styles, and every group
    # equally often: with the groups' own shares it took the smallest group's wishes for those of the others.
    reward_slip_rate: float = 0.15
    reward_style_rate: float = 0.85
    truncated_share: float = 0.5
    reward_damage_rate: float = 0.3  # of one token in a written answer
    reward_policy_share: float = 0.5  # of answers that the policy samples
    # Without it the scores of right answers grow apart for no reason, and the highest of many is the luckiest.
    reward_label_smoothing: float = 0.02
    s3d_prompts: int = 1500
    s3d_steps: int = 1500


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids with one label per token: the token itself (policy) or the answer's truth (reward)."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


def encode(tokenizer: PreTrainedTokenizerFast, questions: Sequence[str]) -> list[list[int]]:
    """Token ids of each question up to and including the assistant's role token."""
    texts = [
        cast(
            str,
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            ),
        )
        for text in questions
    ]
    return token_ids(tokenizer, texts)


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
