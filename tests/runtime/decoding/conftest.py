"""Helpers of the engine tests: run an engine, and a reward whose scores are written in a table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest

from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutPolicy, CutSchedule
from runtime.decoding.s3d.rounds import S3DDecoding
from runtime.decoding.sampling import SamplingConfig
from runtime.models import LoadedModel
from runtime.records import Candidate, Prompt
from runtime.rewards.protocol import Reward, Score

Key = tuple[str, int]
Decode = Callable[..., dict[Key, Candidate]]


@dataclass
class TableReward:
    """Score of (prompt_id, candidate_index), whatever the text; NaN and missing entries are failures."""

    table: Mapping[Key, float]
    name: str = "table"
    kv_bytes_per_token: int = 0

    def start(self, prompts: Sequence[Prompt]) -> "TableSession":
        return TableSession(self.table, prompts, {})

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Score]:
        raise NotImplementedError


@dataclass
class TableSession:
    """Also checks what the engine promises: each token is handed over once, texts only grow."""

    table: Mapping[Key, float]
    prompts: Sequence[Prompt]
    ids: dict[int, list[int]]

    def extend(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]], texts: Sequence[str]) -> None:
        for row, new in zip(rows, token_ids, strict=True):
            assert new or row in self.ids
            self.ids.setdefault(row, []).extend(new)

    def scores(self, rows: Sequence[int]) -> list[Score]:
        return [Score.of(self.table.get((self.prompts[row].prompt_id, row), float("nan"))) for row in rows]

    def keep(self, rows: Sequence[int]) -> None:
        assert set(rows) <= set(self.ids)


@pytest.fixture
def table_reward() -> type[TableReward]:
    """The class above."""
    return TableReward


@pytest.fixture(scope="session")
def decode(tiny_policy: LoadedModel) -> Decode:
    """Run an engine over prompts; candidates by (prompt_id, candidate_index)."""

    def run(
        prompts: Sequence[Prompt],
        cuts: CutPolicy | None = None,
        reward: Reward | None = None,
        max_rows: int = 16,
        policy: LoadedModel = tiny_policy,
        kv_budget: int | None = None,
        s3d: S3DDecoding | None = None,
        **sampling: float,
    ) -> dict[Key, Candidate]:
        config = SamplingConfig(**{"n": 8, "max_new_tokens": 40, **sampling})  # type: ignore[arg-type]
        engine = Engine(policy, config, cuts or CutSchedule(), reward, max_rows, kv_budget=kv_budget, s3d=s3d)
        results = list(engine.generate(prompts))
        assert [found[0].prompt_id for found in results] == [prompt.prompt_id for prompt in prompts]
        assert all([c.candidate_index for c in found] == list(range(config.n)) for found in results)
        return {(c.prompt_id, c.candidate_index): c for found in results for c in found}

    return run
