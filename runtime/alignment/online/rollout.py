"""Answers drawn from the weights as they are now, scored, as one batch of tensors.

The decoding engine shares the model with the training: nothing is copied, and nothing that it computed outlives an
update. Noise is a function of (seed, step), so a step can be drawn again.
"""

import hashlib
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from runtime.alignment.collate import Batch, moved, padded
from runtime.alignment.online.ranks import Ranks
from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutSchedule
from runtime.decoding.s3d.rounds import S3DDecoding
from runtime.decoding.sampling import SamplingConfig
from runtime.errors import ConfigError, InputError
from runtime.models import LoadedModel, PromptFormat, encode_prompt
from runtime.records import FINISHED, Candidate, Prompt
from runtime.rewards.protocol import Reward, Score


@dataclass(frozen=True, slots=True)
class Drawing:
    """How answers are drawn. max_rows: decoded together. eos_penalty: taken off the reward of an answer that did not
    end within max_new_tokens."""

    temperature: float = 1.0
    max_new_tokens: int = 128
    max_rows: int = 128
    seed: int = 0
    prompt_format: PromptFormat = "chat"
    eos_penalty: float = 0.0
    s3d: S3DDecoding | None = None

    def __post_init__(self) -> None:
        """ConfigError for what cannot work."""
        if not self.temperature > 0:
            raise ConfigError(f"temperature = {self.temperature}: a greedy policy has nothing to learn from; use 1")
        if not 0 <= self.eos_penalty < math.inf:
            raise ConfigError(f"eos_penalty = {self.eos_penalty} must be 0 or above")


@dataclass(frozen=True, slots=True)
class Rollout:
    """Answers to some prompts, the same number to each, prompt by prompt.

    batch: their token ids; rewards (rows,), 0 where is_scored (rows,) is False; errors: why rows have no reward.
    """

    prompts: Sequence[Prompt]
    answers: Sequence[Candidate]
    batch: Batch
    rewards: Tensor
    is_scored: Tensor
    errors: Mapping[str, int]

    @property
    def n_samples(self) -> int:
        """Answers per prompt."""
        return len(self.answers) // len(self.prompts)

    @property
    def groups(self) -> list[str]:
        """Of each row."""
        return [prompt.group for prompt in self.prompts for _ in range(self.n_samples)]

    def by_prompt(self, values: Tensor) -> Tensor:
        """(rows,) -> (prompts, samples)."""
        return values.view(len(self.prompts), -1)


class Sampler:
    """Draws and scores."""

    def __init__(self, reward: Reward, drawing: Drawing, ranks: Ranks | None = None) -> None:
        self.reward, self.drawing, self.ranks = reward, drawing, ranks or Ranks()

    def draw(self, policy: LoadedModel, prompts: Sequence[Prompt], n: int, turn: str, greedy: bool = False) -> Rollout:
        """n answers to each prompt by the policy's present weights; `turn` names the noise."""
        drawing = self.drawing
        sampling = SamplingConfig(
            n=n,
            temperature=0.0 if greedy else drawing.temperature,
            max_new_tokens=drawing.max_new_tokens,
            seed=_seed(drawing.seed, turn),
        )
        engine = Engine(
            policy, sampling, CutSchedule(), None, max(drawing.max_rows, n), drawing.prompt_format, s3d=drawing.s3d
        )
        mine = self.ranks.own(prompts)
        drawn = [answer for each in engine.generate(mine) for answer in each]
        found = self._scores([prompt for prompt in mine for _ in range(n)], drawn)
        answers, scores = self.ranks.joined(drawn), self.ranks.joined(found)
        rows = [prompt for prompt in prompts for _ in range(n)]
        device = policy.model.device
        return Rollout(
            prompts,
            answers,
            moved(self._batch(policy, rows, answers), device),
            torch.tensor([score.value or 0.0 for score in scores], device=device),
            torch.tensor([score.value is not None for score in scores], device=device),
            Counter(score.error for score in scores if score.error),
        )

    def _scores(self, rows: Sequence[Prompt], answers: Sequence[Candidate]) -> list[Score]:
        """An answer that could not be drawn has none."""
        drawn = [place for place, answer in enumerate(answers) if answer.finish_reason in FINISHED]
        found = [Score(None, answer.error or f"finish_reason {answer.finish_reason}") for answer in answers]
        texts = [answers[place].response for place in drawn]
        for place, score in zip(drawn, self.reward.score([rows[place] for place in drawn], texts), strict=True):
            late = self.drawing.eos_penalty if answers[place].finish_reason == "length" else 0.0
            found[place] = score if score.value is None else replace(score, value=score.value - late)
        return found

    def _batch(self, policy: LoadedModel, rows: Sequence[Prompt], answers: Sequence[Candidate]) -> Batch:
        prompt_ids = [
            encode_prompt(policy.tokenizer, prompt.messages, self.drawing.prompt_format) if answer.token_ids else [0]
            for prompt, answer in zip(rows, answers, strict=True)
        ]
        ids = [[*start, *answer.token_ids] for start, answer in zip(prompt_ids, answers, strict=True)]
        lengths = torch.tensor([len(one) for one in ids])[:, None]
        starts = torch.tensor([len(one) for one in prompt_ids])[:, None]
        token_ids = padded(ids, 0)
        place = torch.arange(token_ids.shape[1])
        mask = place < lengths
        return Batch(token_ids, mask.long(), mask & (place >= starts))


class PromptOrder:
    """Which prompts a step takes: every prompt once per epoch, each epoch in another order."""

    def __init__(self, prompts: Sequence[Prompt], per_step: int, seed: int) -> None:
        if not prompts:
            raise InputError("there is no prompt to train on")
        self.prompts, self.per_step, self.seed = prompts, min(per_step, len(prompts)), seed

    def at(self, step: int) -> list[Prompt]:
        """The prompts of step 0, 1, ..."""
        return [self._nth(step * self.per_step + place) for place in range(self.per_step)]

    def _nth(self, number: int) -> Prompt:
        epoch, place = divmod(number, len(self.prompts))
        order = list(range(len(self.prompts)))
        random.Random(f"{self.seed} epoch {epoch}").shuffle(order)
        return self.prompts[order[place]]


def _seed(seed: int, turn: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {turn}".encode()).digest()[:4], "big") >> 1
