"""Greedy S3D equals greedy plain decoding on trained models, for rows, drafts and kept layers in all combinations.

Drafts are scripted, right but for one in three, so that blocks of every length stay; the draft pass runs all the same
and writes into the rows' slots. One prompt more than there are rows: each run refills.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutSchedule
from runtime.decoding.s3d import rounds
from runtime.decoding.s3d.adapter import S3DAdapter
from runtime.decoding.s3d.rounds import S3DDecoding
from runtime.decoding.s3d.verify import Block, Drafts, RuleName
from runtime.decoding.sampling import SamplingConfig
from runtime.models import LoadedModel, PromptFormat, load_policy
from runtime.randomness import row_key
from runtime.records import Message, Prompt
from runtime.starter import path

ROWS, KS = range(1, 17), range(7)
TEXT = "Lily and the dog went to the park because they had 3 apples plus 14 more and wanted to see how many"
PROMPTS = [Prompt(str(n), (Message("user", " ".join(TEXT.split()[: 1 + 5 * n % 19])),), "g") for n in range(17)]


class Greedy:
    """A policy's greedy answers, plain and with drafts from any kept layers."""

    def __init__(self, policy: LoadedModel, prompt_format: PromptFormat, new: int) -> None:
        self.policy, self.prompt_format, self.new = policy, prompt_format, new
        self.n_layers = int(policy.model.config.num_hidden_layers)
        self._plain: dict[int, list[tuple[int, ...]]] = {}
        self.known = {row_key(0, prompt.prompt_id, 0): ids for prompt, ids in zip(PROMPTS, self.plain(16), strict=True)}

    def kept(self) -> list[tuple[int, int]]:
        """Every choice of first and last layers."""
        n = self.n_layers
        return [(first, last) for first, last in product(range(n + 1), repeat=2) if 1 <= first + last <= n]

    def plain(self, rows: int) -> list[tuple[int, ...]]:
        """Plain decoding's answers, computed once per number of rows."""
        if rows not in self._plain:
            self._plain[rows] = self.decode(rows, None)
        return self._plain[rows]

    def decode(self, rows: int, s3d: S3DDecoding | None) -> list[tuple[int, ...]]:
        """Answers to one prompt more than there are rows."""
        sampling = SamplingConfig(n=1, temperature=0, max_new_tokens=self.new)
        engine = Engine(self.policy, sampling, CutSchedule(), None, rows, self.prompt_format, s3d=s3d)
        return [c.token_ids for answers in engine.generate(PROMPTS[: rows + 1]) for c in answers]

    def drafted(self, rows: int, kept: tuple[int, int], k: int) -> list[tuple[int, ...]]:
        """The same with k drafts per round."""
        return self.decode(rows, S3DDecoding(S3DAdapter.skip_only(self.policy, *kept, max(k, 1)), k))

    def draft(self, block: Block, logits: Tensor, rule: RuleName) -> Drafts:
        """What the answer says next, but for one token in three."""
        k, found = logits.shape[1], []
        for key, start in zip(block.keys.tolist(), block.start.tolist(), strict=True):
            right = [*self.known[key][start : start + k], *[7] * k][:k]
            found.append([token if hash((key, start + place)) % 3 else 9 for place, token in enumerate(right)])
        return Drafts(torch.tensor(found), logits)


@pytest.fixture(scope="module", params=["starter", pytest.param("stories3m", marks=pytest.mark.shared)])
def greedy(request: pytest.FixtureRequest) -> Greedy:
    """Of the starter and of a small model of stories."""
    if request.param == "starter":
        return Greedy(load_policy(str(path("policy"))), "chat", 12)
    folder: Path = request.getfixturevalue("shared_models")
    return Greedy(load_policy(str(folder / "stories3m")), "text", 12)


@pytest.fixture
def accepted(greedy: Greedy, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Scripted drafts; how many stayed, round by round and row by row."""
    stayed: list[int] = []
    original = rounds.verify

    def verify(*args: Any) -> Any:
        verdict = original(*args)
        stayed.extend(verdict.accepted.tolist())
        return verdict

    monkeypatch.setattr(rounds, "draft", greedy.draft)
    monkeypatch.setattr(rounds, "verify", verify)
    yield stayed


def _differ(
    greedy: Greedy, cases: Sequence[tuple[int, tuple[int, int], int]]
) -> list[tuple[int, tuple[int, int], int]]:
    return [case for case in cases if greedy.drafted(*case) != greedy.plain(case[0])]


def test_greedy_answers_are_those_of_plain_decoding(greedy: Greedy, accepted: list[int]) -> None:
    n = greedy.n_layers
    cases = [(1, (1, 1), 6), (5, (n, 0), 3), (16, (2, n - 2), 4), (2, (0, 1), 1)]
    assert _differ(greedy, cases) == []
    assert {0, 1, 2, 3} <= set(accepted)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_greedy_answers_are_those_of_plain_decoding_for_all_kept_layers_and_drafts(
    greedy: Greedy, accepted: list[int]
) -> None:
    """Every pair of kept layers and k, and every pair of rows and k."""
    kept = greedy.kept()
    cases = [(ROWS[place % len(ROWS)], choice, k) for place, (choice, k) in enumerate(product(kept, KS))]
    assert {(rows, k) for rows, _, k in cases} == set(product(ROWS, KS))
    assert _differ(greedy, cases) == []
    assert all(greedy.plain(rows) == greedy.plain(16)[: rows + 1] for rows in ROWS)
    assert set(accepted) == set(range(max(accepted) + 1)) and max(accepted) >= 5


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(7200)
def test_greedy_answers_are_those_of_plain_decoding_on_the_whole_grid(greedy: Greedy, accepted: list[int]) -> None:
    assert _differ(greedy, list(product(ROWS, greedy.kept(), KS))) == []
