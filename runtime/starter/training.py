"""How the starter's two models are trained: one small loop over length-bucketed, right-padded batches."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
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

from runtime.starter.examples import IGNORED, POOL_SIZE, Example, StarterSettings, encode, token_ids
from runtime.starter.problems import (
    GROUP_SHARES,
    Question,
    draw_question,
    draw_style,
    draw_totals,
    write_answer,
)
from runtime.starter.reward_data import RewardData, number_ids, policy_sampler
from runtime.starter.reward_network import build_reward_network

Report = Callable[[str, int, float], None]  # (model, tokens seen, smoothed loss)


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
    data = RewardData(tokenizer, settings, policy_sampler(policy, tokenizer), rng)

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        judged = labels != IGNORED
        scores = model.score(hidden[judged]).float().squeeze(-1)
        smoothing = settings.reward_label_smoothing
        wanted = labels[judged].float() * (1 - 2 * smoothing) + smoothing
        return nn.functional.binary_cross_entropy_with_logits(scores, wanted)

    pools = (data.pool() for _ in iter(int, 1))
    budget = _Budget("reward", settings.reward_tokens, settings.reward_learning_rate)
    batches = _batches(pools, tokenizer, settings.reward_batch_tokens, rng)
    _train(model, batches, loss, budget, report)
    return model


def _reward_network(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: StarterSettings
) -> LlamaForSequenceClassification:
    pool = _policy_pool(tokenizer, settings, random.Random(f"scale {settings.seed}"))
    sample = _pad([example.ids for example in pool[:64]], cast(int, tokenizer.pad_token_id))
    return build_reward_network(policy, settings.n_reward_layers, number_ids(tokenizer), sample)


def draw_answer(question: Question, settings: StarterSettings, rng: random.Random) -> tuple[str, bool]:
    """An answer as the policy's training text has them, and whether it is true."""
    totals = draw_totals(question.problem, settings.slip_rate, rng)
    style = draw_style(question.group, settings.style_rate, rng)
    is_true = style == question.group and totals[-1] == question.problem.answer
    return write_answer(question.problem, style, totals), is_true


@dataclass(frozen=True, slots=True)
class _Budget:
    name: str
    tokens: int
    learning_rate: float


def _policy_pool(tokenizer: PreTrainedTokenizerFast, settings: StarterSettings, rng: random.Random) -> list[Example]:
    questions = [draw_question(rng, False, GROUP_SHARES) for _ in range(POOL_SIZE)]
    prompts = encode(tokenizer, [question.text for question in questions])
    bodies = token_ids(tokenizer, [draw_answer(question, settings, rng)[0] for question in questions])
    end = cast(int, tokenizer.eos_token_id)
    return [
        Example((*prompt, *body, end), (*[IGNORED] * len(prompt), *body, end))
        for prompt, body in zip(prompts, bodies, strict=True)
    ]


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
