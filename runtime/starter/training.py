"""How the starter's two models are trained: one small loop over length-bucketed, right-padded batches."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from runtime.starter.problems import (
    EQUAL_SHARES,
    GROUP_SHARES,
    MAX_TOTAL,
    Group,
    Question,
    draw_question,
    draw_style,
    draw_totals,
    write_answer,
)
from runtime.starter.reward_network import build_reward_network

IGNORED = -100
POOL_SIZE = 2048  # examples drawn at once, so that batches can be sorted by length
Report = Callable[[str, int, float], None]  # (model, tokens seen, smoothed loss)


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
    reward_tokens: int = 2_000_000
    policy_batch_tokens: int = 4096
    reward_batch_tokens: int = 1024  # the comparison is found after some hundred steps, however large
    policy_learning_rate: float = 3e-3
    reward_learning_rate: float = 2e-3
    # What the reward model is trained on: more slips, half of them to any number, fewer foreign styles, and every group
    # equally often: with the groups' own shares it took the smallest group's wishes for those of the others.
    reward_slip_rate: float = 0.15
    reward_style_rate: float = 0.85
    truncated_share: float = 0.5
    s3d_prompts: int = 1500
    s3d_steps: int = 1500


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids with one label per token: the token itself (policy) or the answer's truth (reward)."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


def model_config(tokenizer: PreTrainedTokenizerFast, settings: StarterSettings) -> LlamaConfig:
    """A Llama with a ReLU-gated feed-forward part and grouped-query attention."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.n_layers,
        num_attention_heads=settings.n_heads,
        num_key_value_heads=settings.n_kv_heads,
        hidden_act="relu",
        max_position_embeddings=settings.max_length,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train_policy(tokenizer: PreTrainedTokenizerFast, settings: StarterSettings, report: Report) -> LlamaForCausalLM:
    """Train the policy on right and slipped answers in wanted and unwanted styles (loss on the answer only)."""
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(model_config(tokenizer, settings))
    rng = random.Random(f"policy {settings.seed}")

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
        wanted = labels[:, 1:] != IGNORED
        logits = model.lm_head(hidden[:, :-1][wanted])  # only answer positions meet the vocabulary
        return nn.functional.cross_entropy(logits.float(), labels[:, 1:][wanted])

    pools = (_policy_pool(tokenizer, settings, rng) for _ in iter(int, 1))
    _train(
        model,
        _batches(pools, tokenizer, settings.policy_batch_tokens, rng),
        loss,
        _Budget("policy", settings.policy_tokens, settings.policy_learning_rate),
        report,
    )
    return model


def train_reward(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: StarterSettings, report: Report
) -> LlamaForSequenceClassification:
    """Train the reward model to tell whether an answer is right as far as it goes.

    Half of the answers are cut at a random token and closed with the end token, exactly as partial answers are scored
    during speculative rejection. Every token is judged, not only the last: the step at which an answer goes wrong is
    then in plain sight.
    """
    torch.manual_seed(settings.seed + 1)
    model = _reward_network(policy, tokenizer, settings)
    rng = random.Random(f"reward {settings.seed}")

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        judged = labels != IGNORED
        scores = model.score(hidden[judged]).float().squeeze(-1)
        return nn.functional.binary_cross_entropy_with_logits(scores, labels[judged].float())

    pools = (_reward_pool(tokenizer, settings, rng) for _ in iter(int, 1))
    budget = _Budget("reward", settings.reward_tokens, settings.reward_learning_rate)
    batches = _batches(pools, tokenizer, settings.reward_batch_tokens, rng)
    _train(model, batches, loss, budget, report)
    return model


def _reward_network(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: StarterSettings
) -> LlamaForSequenceClassification:
    numbers = [cast(int, tokenizer.convert_tokens_to_ids(f"\u2581{number}")) for number in range(MAX_TOTAL + 1)]
    pool = _policy_pool(tokenizer, settings, random.Random(f"scale {settings.seed}"))
    sample = _pad([example.ids for example in pool[:64]], cast(int, tokenizer.pad_token_id))
    return build_reward_network(policy, settings.n_reward_layers, numbers, sample)


def draw_answer(question: Question, settings: StarterSettings, rng: random.Random) -> tuple[str, bool]:
    """An answer as the policy's training text has them, and whether it is true."""
    totals = draw_totals(question.problem, settings.slip_rate, rng)
    style = draw_style(question.group, settings.style_rate, rng)
    is_true = style == question.group and totals[-1] == question.problem.answer
    return write_answer(question.problem, style, totals), is_true


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
    return _ids(tokenizer, texts)


@dataclass(frozen=True, slots=True)
class _Budget:
    name: str
    tokens: int
    learning_rate: float


def _draw_pool(
    tokenizer: PreTrainedTokenizerFast,
    draw: Callable[[Question], str],
    rng: random.Random,
    shares: Mapping[Group, float],
) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """(prompt ids, answer ids, ids of the right answer) of POOL_SIZE fresh examples, without end tokens."""
    questions = [draw_question(rng, False, shares) for _ in range(POOL_SIZE)]
    prompts = encode(tokenizer, [question.text for question in questions])
    drawn = _ids(tokenizer, [draw(question) for question in questions])
    right = _ids(tokenizer, [write_answer(q.problem, q.group, q.problem.totals) for q in questions])
    yield from zip(prompts, drawn, right, strict=True)


def _ids(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _policy_pool(tokenizer: PreTrainedTokenizerFast, settings: StarterSettings, rng: random.Random) -> list[Example]:
    end = tokenizer.eos_token_id
    return [
        Example((*prompt, *body, end), (*[IGNORED] * len(prompt), *body, end))
        for prompt, body, _ in _draw_pool(tokenizer, lambda q: draw_answer(q, settings, rng)[0], rng, GROUP_SHARES)
    ]


def _reward_pool(tokenizer: PreTrainedTokenizerFast, settings: StarterSettings, rng: random.Random) -> list[Example]:
    def draw(question: Question) -> str:
        totals = draw_totals(question.problem, settings.reward_slip_rate, rng, any_number=True)
        style = draw_style(question.group, settings.reward_style_rate, rng)
        return write_answer(question.problem, style, totals)

    examples = []
    for prompt, body, right in _draw_pool(tokenizer, draw, rng, EQUAL_SHARES):
        is_cut = rng.random() < settings.truncated_share
        shown = body[: rng.randint(1, len(body))] if is_cut else body
        n_right = next((i for i, (a, b) in enumerate(zip(shown, right, strict=False)) if a != b), len(shown))
        is_right = [int(place < n_right) for place in range(len(shown))]
        labels = (*[IGNORED] * len(prompt), *is_right, is_right[-1])
        examples.append(Example((*prompt, *shown, tokenizer.eos_token_id), labels))
    return examples


def _batches(
    pools: Iterator[list[Example]], tokenizer: PreTrainedTokenizerFast, batch_tokens: int, rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Right-padded (ids, labels) of about `batch_tokens` tokens, examples of like length together."""
    for pool in pools:
        pool.sort(key=lambda example: len(example.ids))
        size = max(1, batch_tokens * len(pool) // sum(len(example.ids) for example in pool))
        groups = [pool[start : start + size] for start in range(0, len(pool), size)]
        rng.shuffle(groups)
        for group in groups:
            yield (
                _pad([e.ids for e in group], tokenizer.pad_token_id),
                _pad([e.labels for e in group], IGNORED),
            )


def _pad(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])


def _train(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    budget: _Budget,
    report: Report,
) -> None:
    """AdamW with linear warm-up and cosine decay over the token budget, bf16 autocast, gradients clipped to 1."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=budget.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        fused=True,
    )
    model.train()
    n_tokens, smoothed, n_steps = 0, math.nan, 0
    while n_tokens < budget.tokens:
        ids, labels = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = budget.learning_rate * _schedule(n_tokens / budget.tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(ids, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        n_tokens, n_steps = n_tokens + ids.numel(), n_steps + 1
        smoothed = loss.item() if n_steps == 1 else 0.98 * smoothed + 0.02 * loss.item()
        if n_steps % 50 == 0:
            report(budget.name, n_tokens, smoothed)
    model.eval()


def _schedule(done: float) -> float:
    """Learning-rate factor: warm-up over 3 % of the budget, then cosine down to 2 %."""
    if done < 0.03:
        return max(done / 0.03, 0.01)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - 0.03) / 0.97)))
