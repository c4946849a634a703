"""The policy's own answers to problems, for the recipes that learn from them and the check that judges them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutSchedule
from runtime.decoding.sampling import SamplingConfig
from runtime.models import LoadedModel
from runtime.records import Candidate, Message, Progress, Prompt
from runtime.starter.problems import Question

MAX_ROWS = 256


def as_prompt(prompt_id: str, question: Question) -> Prompt:
    """A question as the engine takes it."""
    return Prompt(prompt_id, (Message("user", question.text),), question.group, str(question.problem.answer))


def sample_answers(
    policy: LoadedModel,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    max_rows: int = MAX_ROWS,
    on_progress: Progress | None = None,
) -> Iterator[list[Candidate]]:
    """All candidates of each prompt, none of them cut."""
    engine = Engine(policy, sampling, CutSchedule(), None, max(max_rows, sampling.n))
    return engine.generate(prompts, on_progress)
