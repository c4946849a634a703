"""The starter's models and prompts for benchmarks, and one measured run: decode, score what finished, take the best."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from runtime.decoding.calibration import Proposal, Trace, propose
from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutPolicy, CutSchedule
from runtime.decoding.sampling import SamplingConfig
from runtime.models import LoadedModel, load_classifier, load_policy
from runtime.records import FINISHED, Candidate, Message, Prompt
from runtime.rewards.classifier import ClassifierReward
from runtime.starter import path, prompts_path
from runtime.starter.rule import truth

CALIBRATION_TOKENS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48)


@dataclass(frozen=True, slots=True)
class Starter:
    """The shipped policy and reward model."""

    policy: LoadedModel
    reward: ClassifierReward

    @classmethod
    def load(cls, device: str, dtype: str = "float32") -> Starter:
        policy = load_policy(str(path("policy")), dtype, device)
        return cls(policy, ClassifierReward(load_classifier(str(path("reward")), dtype, device)))

    @classmethod
    def random(cls, device: str, sizes: Mapping[str, int]) -> Starter:
        """Random models of other sizes with the starter's tokenizer: as slow as real ones, and as long-winded."""
        tokenizer = load_policy(str(path("policy"))).tokenizer
        tokenizer.model_max_length = 4096
        torch.manual_seed(0)
        config = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, "pad_token_id": tokenizer.pad_token_id}
        policy = LlamaForCausalLM(LlamaConfig(**sizes, **config)).eval().to(device)
        reward = LlamaForSequenceClassification(LlamaConfig(**sizes, **config, num_labels=1)).eval().to(device)
        return cls(
            LoadedModel(policy, tokenizer, "random", ""), ClassifierReward(LoadedModel(reward, tokenizer, "random", ""))
        )

    def engine(self, n: int, cuts: CutPolicy, max_rows: int = 128) -> Engine:
        return Engine(self.policy, SamplingConfig(n=n), cuts, self.reward, max(max_rows, n))


@dataclass(frozen=True, slots=True)
class Run:
    """What one run over all prompts gave; lists have one entry per prompt."""

    seconds: float
    tokens: int
    best: list[float]
    truths: list[float]
    all_scores: list[list[float]]  # of the finished candidates


def prompts(first: int, count: int) -> list[Prompt]:
    """Prompts `first` to `first + count - 1` of the starter."""
    rows = [json.loads(line) for line in prompts_path().read_text().splitlines()[first : first + count]]
    assert len(rows) == count, f"the starter has no {first + count} prompts"
    return [
        Prompt(f"bench-{first + i}", (Message("user", row["messages"][0]["content"]),), row["group"], row["reference"])
        for i, row in enumerate(rows)
    ]


def measure(starter: Starter, engine: Engine, asked: Sequence[Prompt]) -> Run:
    """Decode, score the finished answers, take each prompt's best; the seconds include all of it."""
    started = time.perf_counter()
    answers = list(engine.generate(asked))
    finished = [[c for c in candidates if c.finish_reason in FINISHED] for candidates in answers]
    scores = [_final_scores(starter, prompt, done) for prompt, done in zip(asked, finished, strict=True)]
    seconds = time.perf_counter() - started
    winners = [max(range(len(s)), key=s.__getitem__) for s in scores]
    return Run(
        seconds,
        sum(c.n_tokens for candidates in answers for c in candidates),
        [s[winner] for s, winner in zip(scores, winners, strict=True)],
        [truth(p, done[w].response) for p, done, w in zip(asked, finished, winners, strict=True)],
        scores,
    )


def calibrated(starter: Starter, asked: Sequence[Prompt], n: int, retained: float) -> Proposal:
    """The schedule that a calibration on these prompts proposes."""
    cuts = CutSchedule(CALIBRATION_TOKENS, (1.0,) * len(CALIBRATION_TOKENS))
    answers = list(starter.engine(n, cuts).generate(asked))
    traces = []
    for prompt, candidates in zip(asked, answers, strict=True):
        done = [c for c in candidates if c.finish_reason in FINISHED]
        scores = _final_scores(starter, prompt, done)
        partial = [{cut.n_tokens: cut.score for cut in c.cuts} for c in done]
        traces.append([Trace(c.n_tokens, s, p) for c, s, p in zip(done, scores, partial, strict=True)])
    return propose(traces, CALIBRATION_TOKENS, retained)


def _final_scores(starter: Starter, prompt: Prompt, done: Sequence[Candidate]) -> list[float]:
    scores = starter.reward.score([prompt] * len(done), [c.response for c in done])
    values = [score.value for score in scores if score.value is not None]
    assert len(values) == len(done)
    return values
