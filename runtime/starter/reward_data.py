"""What the starter's reward model learns from: right and wrong answers, many cut short, each token judged.

Half of the answers are the policy's own, so that the mistakes the reward model has to find among many samples are the
policy's; slips and damaged tokens in the other half are those that are too rare to be met there.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from runtime.decoding.sampling import SamplingConfig
from runtime.models import LoadedModel
from runtime.starter.answers import as_prompt, sample_answers
from runtime.starter.examples import IGNORED, POOL_SIZE, Example, StarterSettings, encode, token_ids
from runtime.starter.problems import (
    EQUAL_SHARES,
    MAX_TOTAL,
    Question,
    draw_question,
    draw_style,
    draw_totals,
    write_answer,
)

SAMPLES_PER_QUESTION = 4

Sampler = Callable[[Sequence[Question], int], list[list[int]]]  # (questions, seed) -> answers without an end token


@dataclass(frozen=True, slots=True)
class RewardData:
    """Draws pools of judged answers."""

    tokenizer: PreTrainedTokenizerFast
    settings: StarterSettings
    sample: Sampler
    rng: random.Random

    def pool(self) -> list[Example]:
        """POOL_SIZE fresh examples."""
        n_sampled = int(POOL_SIZE * self.settings.reward_policy_share) // SAMPLES_PER_QUESTION
        asked = [draw_question(self.rng, False, EQUAL_SHARES) for _ in range(n_sampled)]
        bodies = self.sample(asked, self.rng.randrange(2**31)) if asked else []
        questions = [question for question in asked for _ in range(SAMPLES_PER_QUESTION)]
        written = [draw_question(self.rng, False, EQUAL_SHARES) for _ in range(POOL_SIZE - len(questions))]
        bodies += [self._damaged(ids) for ids in token_ids(self.tokenizer, [self._write(one) for one in written])]
        questions += written
        prompts = encode(self.tokenizer, [question.text for question in questions])
        right = [write_answer(one.problem, one.group, one.problem.totals) for one in questions]
        rights = token_ids(self.tokenizer, right)
        return [self._judged(*parts) for parts in zip(prompts, bodies, rights, strict=True)]

    def _write(self, question: Question) -> str:
        totals = draw_totals(question.problem, self.settings.reward_slip_rate, self.rng, any_number=True)
        style = draw_style(question.group, self.settings.reward_style_rate, self.rng)
        return write_answer(question.problem, style, totals)

    def _damaged(self, body: list[int]) -> list[int]:
        """Now and then one token is another one or missing; a number gives way to a number."""
        if self.rng.random() >= self.settings.reward_damage_rate:
            return body
        place = self.rng.randrange(len(body))
        numbers = number_ids(self.tokenizer)
        if body[place] in numbers:
            return [*body[:place], self.rng.choice(numbers), *body[place + 1 :]]
        return [*body[:place], *([self.rng.choice(body)] if self.rng.random() < 0.5 else []), *body[place + 1 :]]

    def _judged(self, prompt: list[int], body: list[int], right: list[int]) -> Example:
        """The answer, perhaps cut short, closed as partial answers are when they are scored."""
        is_cut = self.rng.random() < self.settings.truncated_share and body
        shown = body[: self.rng.randint(1, len(body))] if is_cut else body
        n_right = next((i for i, (a, b) in enumerate(zip(shown, right, strict=False)) if a != b), len(shown))
        n_right = min(n_right, len(right))
        is_right = [int(place < n_right) for place in range(len(shown))]
        labels = (*[IGNORED] * len(prompt), *is_right, int(n_right == len(shown)))
        return Example((*prompt, *shown, cast(int, self.tokenizer.eos_token_id)), labels)


def number_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens of the numbers 0 to MAX_TOTAL."""
    return [cast(int, tokenizer.convert_tokens_to_ids(f"\u2581{number}")) for number in range(MAX_TOTAL + 1)]


def policy_sampler(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Sampler:
    """Answers of the policy at temperature 1, SAMPLES_PER_QUESTION per question."""
    loaded = LoadedModel(copy.deepcopy(policy), tokenizer, "policy", "")

    def sample(questions: Sequence[Question], seed: int) -> list[list[int]]:
        prompts = [as_prompt(str(i), question) for i, question in enumerate(questions)]
        drawn = sample_answers(loaded, prompts, SamplingConfig(n=SAMPLES_PER_QUESTION, seed=seed))
        end = tokenizer.eos_token_id
        return [[one for one in c.token_ids if one != end] for answers in drawn for c in answers]

    return sample
