"""Cuts inside the engine, against plain Best-of-N of the same seed."""

import random
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from runtime.decoding.adaptive import AdaptiveCuts, Fit
from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutSchedule, MemoryCuts
from runtime.decoding.sampling import SamplingConfig
from runtime.errors import ConfigError
from runtime.kv.arena import Arena, KVShape
from runtime.models import LoadedModel, encode_prompt
from runtime.records import Candidate, Prompt
from runtime.rewards.classifier import ClassifierReward
from runtime.rewards.verifier import FunctionReward

Key = tuple[str, int]
Decode = Callable[..., dict[Key, Candidate]]
SCHEDULE = CutSchedule((4, 10, 20), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def plain(decode: Decode, tiny_prompts: Sequence[Prompt]) -> dict[Key, Candidate]:
    """Plain Best-of-N."""
    return decode(tiny_prompts)


@pytest.fixture(scope="module")
def ranking(plain: Mapping[Key, Candidate]) -> dict[Key, float]:
    """A rank-perfect table: partial and final scores agree."""
    order = random.Random(0)
    return {key: order.random() for key in plain}


@pytest.fixture
def arena_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """After a run: the bytes of all arenas that were alive together, each time one was made or changed its size."""
    alive: weakref.WeakSet[Arena] = weakref.WeakSet()
    seen: list[int] = []
    made, resized = Arena.__init__, Arena.resize

    def count_made(self: Arena, *args: Any) -> None:
        made(self, *args)
        alive.add(self)
        seen.append(sum(arena.n_bytes for arena in alive))

    def count_resized(self: Arena, *args: Any) -> None:
        resized(self, *args)
        seen.append(sum(arena.n_bytes for arena in alive))

    monkeypatch.setattr(Arena, "__init__", count_made)
    monkeypatch.setattr(Arena, "resize", count_resized)
    return seen


def winner(scores: Mapping[Key, float], candidates: Mapping[Key, Candidate], prompt_id: str) -> Key:
    complete = [key for key, c in candidates.items() if key[0] == prompt_id and c.finish_reason in ("eos", "length")]
    return max(complete, key=lambda key: scores[key])


def test_keep_one_everywhere_equals_plain_best_of_n(
    decode: Decode, plain: dict[Key, Candidate], tiny_prompts: Sequence[Prompt], tiny_reward: LoadedModel
) -> None:
    found = decode(tiny_prompts, CutSchedule((4, 10), (1.0, 1.0), contrast=2), ClassifierReward(tiny_reward))
    for key, candidate in plain.items():
        assert found[key].token_ids == candidate.token_ids
        assert found[key].finish_reason == candidate.finish_reason
        assert all(cut.kept for cut in found[key].cuts)
        assert len(found[key].cuts) == sum(candidate.n_tokens > tokens for tokens in (4, 10))


@pytest.mark.parametrize("max_rows", [8, 24])
def test_survivors_are_untouched_and_cut_rows_are_prefixes(
    decode: Decode, plain: dict[Key, Candidate], tiny_prompts: Sequence[Prompt], tiny_reward: LoadedModel, max_rows: int
) -> None:
    found = decode(tiny_prompts, SCHEDULE, ClassifierReward(tiny_reward), max_rows)
    reasons = [candidate.finish_reason for candidate in found.values()]
    assert reasons.count("cut") > len(reasons) // 4
    for key, candidate in found.items():
        assert candidate.token_ids == plain[key].token_ids[: candidate.n_tokens]
        assert all(cut.kept for cut in candidate.cuts[:-1])
        if candidate.finish_reason == "cut":
            assert candidate.cut_at_token == candidate.n_tokens == candidate.cuts[-1].n_tokens
            assert candidate.cut_at_token in SCHEDULE.tokens and not candidate.cuts[-1].kept
        else:
            assert candidate.token_ids == plain[key].token_ids and candidate.cut_at_token is None


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.9])
def test_rank_perfect_partial_scores_keep_the_winner(
    decode: Decode,
    plain: dict[Key, Candidate],
    ranking: dict[Key, float],
    tiny_prompts: Sequence[Prompt],
    table_reward: Any,
    keep: float,
) -> None:
    found = decode(tiny_prompts, CutSchedule((3, 9), (keep, keep)), table_reward(ranking))
    for prompt in tiny_prompts:
        best = winner(ranking, found, prompt.prompt_id)
        assert best == winner(ranking, plain, prompt.prompt_id)
        assert found[best].token_ids == plain[best].token_ids


def test_smallest_keep_leaves_one_row(
    decode: Decode, ranking: dict[Key, float], tiny_prompts: Sequence[Prompt], table_reward: Any
) -> None:
    found = decode(tiny_prompts, CutSchedule((1, 2, 3), (0.01, 0.01, 0.01)), table_reward(ranking))
    for prompt in tiny_prompts:
        rows = [c for c in found.values() if c.prompt_id == prompt.prompt_id]
        assert sum(c.finish_reason in ("eos", "length") for c in rows) >= 1


def test_a_finished_row_with_the_best_score_ends_the_others(
    decode: Decode, plain: dict[Key, Candidate], tiny_prompts: Sequence[Prompt], table_reward: Any
) -> None:
    early = min((key for key, c in plain.items() if c.finish_reason == "eos"), key=lambda key: plain[key].n_tokens)
    at = plain[early].n_tokens + 1
    prompt = next(prompt for prompt in tiny_prompts if prompt.prompt_id == early[0])
    mine = {key: c for key, c in plain.items() if key[0] == early[0]}
    best = decode([prompt], CutSchedule((at,), (0.01,)), table_reward(dict.fromkeys(mine, 0.0) | {early: 1.0}))
    assert all(c.finish_reason == ("cut" if mine[key].n_tokens > at else "eos") for key, c in best.items())
    worst = decode([prompt], CutSchedule((at,), (0.01,)), table_reward(dict.fromkeys(mine, 0.0) | {early: -1.0}))
    assert worst[early] == mine[early]
    assert sum(c.finish_reason == "cut" for c in worst.values()) < sum(c.finish_reason == "cut" for c in best.values())


def test_contrast_rows_are_complete_and_lowest(
    decode: Decode, plain: dict[Key, Candidate], tiny_prompts: Sequence[Prompt], table_reward: Any
) -> None:
    prompt = tiny_prompts[0]
    table = {key: float(key[1]) for key in plain}  # candidate 0 is the worst, then 1, ...
    found = decode([prompt], CutSchedule((2, 6), (0.25, 0.5), contrast=2), table_reward(table))
    running = [index for index in range(8) if plain[prompt.prompt_id, index].n_tokens > 2]
    for index in running[:2]:
        candidate = found[prompt.prompt_id, index]
        assert candidate.token_ids == plain[prompt.prompt_id, index].token_ids
        assert candidate.finish_reason in ("eos", "length")
        assert [cut.kept for cut in candidate.cuts] == [True]
    assert found[prompt.prompt_id, running[2]].finish_reason == "cut"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_failing_score_is_an_error_row(
    decode: Decode,
    plain: dict[Key, Candidate],
    ranking: dict[Key, float],
    tiny_prompts: Sequence[Prompt],
    table_reward: Any,
    bad: float,
) -> None:
    failing = ("prompt-1", max(range(8), key=lambda index: plain["prompt-1", index].n_tokens))
    found = decode(tiny_prompts, CutSchedule((5,), (1.0,)), table_reward({**ranking, failing: bad}))
    row = found[failing]
    assert (row.status, row.finish_reason, row.n_tokens) == ("error", "error", 5)
    assert row.error == f"reward is {bad}, not a finite number"
    assert all(c.status == "ok" for key, c in found.items() if key != failing)


def test_all_scores_failing_ends_the_prompt_with_error_rows(
    decode: Decode, plain: dict[Key, Candidate], tiny_prompts: Sequence[Prompt], table_reward: Any
) -> None:
    found = decode(tiny_prompts[:2], SCHEDULE, table_reward({}))
    assert {c.status for c in found.values()} == {"error"}
    assert all(c.n_tokens <= 4 for c in found.values())


def test_a_finished_row_without_final_score_keeps_its_text(
    decode: Decode,
    plain: dict[Key, Candidate],
    ranking: dict[Key, float],
    tiny_prompts: Sequence[Prompt],
    table_reward: Any,
) -> None:
    early = min((key for key, c in plain.items() if c.finish_reason == "eos"), key=lambda key: plain[key].n_tokens)
    table = {key: score for key, score in ranking.items() if key != early}
    row = decode(tiny_prompts, CutSchedule((plain[early].n_tokens + 1,), (0.5,)), table_reward(table))[early]
    assert (row.status, row.finish_reason, row.token_ids) == ("error", "eos", plain[early].token_ids)


def test_a_raising_function_names_itself(decode: Decode, tiny_prompts: Sequence[Prompt]) -> None:
    def rule(prompt: Prompt, response: str) -> float:
        raise ValueError("no number")

    found = decode(tiny_prompts[:1], CutSchedule((3,), (0.5,)), FunctionReward(rule, "rule"))
    assert {c.error for c in found.values()} == {"rule failed: ValueError: no number"}


def test_a_cut_after_the_last_token_changes_nothing(
    decode: Decode,
    plain: dict[Key, Candidate],
    ranking: dict[Key, float],
    tiny_prompts: Sequence[Prompt],
    table_reward: Any,
) -> None:
    assert decode(tiny_prompts, CutSchedule((40, 80), (0.1, 0.1)), table_reward(ranking)) == plain


PLAIN_POLICIES = {
    "keep 1": CutSchedule((4, 10), (1.0, 1.0)),
    "memory, alpha 0": MemoryCuts(0.0),
    "adaptive, certain": AdaptiveCuts((Fit(4, 0.0, 1.0, 1.0),), confidence=1.0),
}


@pytest.mark.parametrize("name", PLAIN_POLICIES)
def test_policies_that_drop_nobody_are_best_of_n(
    decode: Decode, plain: dict[Key, Candidate], tiny_prompts: Sequence[Prompt], table_reward: Any, name: str
) -> None:
    flat = table_reward(dict.fromkeys(plain, 0.0))  # nobody is ahead, so nobody can be ruled out
    found = decode(tiny_prompts, PLAIN_POLICIES[name], flat, kv_budget=10_000_000)
    assert {key: c.token_ids for key, c in found.items()} == {key: c.token_ids for key, c in plain.items()}


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9])
def test_memory_cuts_keep_the_winner_and_the_budget(
    decode: Decode,
    plain: dict[Key, Candidate],
    ranking: dict[Key, float],
    tiny_policy: LoadedModel,
    tiny_prompts: Sequence[Prompt],
    table_reward: Any,
    alpha: float,
    arena_bytes: list[int],
) -> None:
    """Less memory than all rows need at full length: the worst go when it is full, not before."""
    per_token = KVShape.of(tiny_policy.model).n_bytes(1, torch.float32)
    longest = max(len(encode_prompt(tiny_policy.tokenizer, p.messages, "chat")) for p in tiny_prompts)
    budget = per_token * (longest + 8 * 32)
    found = decode(tiny_prompts, MemoryCuts(alpha), table_reward(ranking), kv_budget=budget, max_new_tokens=120)
    whole = decode(tiny_prompts, max_new_tokens=120)
    assert max(arena_bytes[:1]) <= budget < max(arena_bytes)
    cut = [c for c in found.values() if c.finish_reason == "cut"]
    assert cut and all(c.cut_at_token == 32 or c.cut_at_token == 64 or c.cut_at_token == 96 for c in cut)
    for key, candidate in found.items():
        assert candidate.token_ids == whole[key].token_ids[: candidate.n_tokens]
    for prompt in tiny_prompts:
        assert winner(ranking, found, prompt.prompt_id) == winner(ranking, whole, prompt.prompt_id)


def test_memory_cuts_need_a_budget(tiny_policy: LoadedModel, tiny_reward: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="need a kv_budget"):
        Engine(tiny_policy, SamplingConfig(), MemoryCuts(0.5), ClassifierReward(tiny_reward), 16)


@pytest.mark.parametrize("policy_name", ["none", "schedule", "adaptive"])
@pytest.mark.parametrize("n_prompts_that_fit", [1, 2, 3])
def test_the_budget_holds_and_changes_no_text(
    decode: Decode,
    plain: dict[Key, Candidate],
    tiny_policy: LoadedModel,
    tiny_reward: LoadedModel,
    tiny_prompts: Sequence[Prompt],
    policy_name: str,
    n_prompts_that_fit: int,
    arena_bytes: list[int],
) -> None:
    reward = ClassifierReward(tiny_reward)
    policy = {
        "none": CutSchedule(),
        "schedule": CutSchedule((4, 10), (0.5, 0.5)),
        "adaptive": AdaptiveCuts((Fit(4, 0.0, 1.0, 0.01), Fit(10, 0.0, 1.0, 0.01))),
    }[policy_name]
    longest = max(len(encode_prompt(tiny_policy.tokenizer, p.messages, "chat")) for p in tiny_prompts)
    per_token = KVShape.of(tiny_policy.model).n_bytes(1, torch.float32)
    per_reward_token = reward.kv_bytes_per_token if policy.is_cutting else 0
    per_prompt = longest * (per_token + per_reward_token) + 8 * (41 * per_token + (10 + 8) * per_reward_token)
    budget = n_prompts_that_fit * per_prompt
    found = decode(tiny_prompts, policy, reward, max_rows=48, kv_budget=budget)
    assert max(arena_bytes) <= budget
    for key, candidate in found.items():
        assert candidate.token_ids == plain[key].token_ids[: candidate.n_tokens]


def test_a_prompt_above_the_budget_is_refused_with_what_it_needs(
    decode: Decode, tiny_prompts: Sequence[Prompt]
) -> None:
    found = decode(tiny_prompts[:1], kv_budget=1000)
    assert {c.status for c in found.values()} == {"error"}
    message = found[tiny_prompts[0].prompt_id, 0].error
    assert message is not None and re.search(r"needs 0\.\d MB of keys and values, the budget is 0\.0 MB", message)


def test_waves_stop_where_more_samples_no_longer_pay(
    decode: Decode, plain: dict[Key, Candidate], tiny_prompts: Sequence[Prompt], table_reward: Any
) -> None:
    """Prompt 0 has a clear winner in its first wave, all others have equal scores."""
    first = tiny_prompts[0].prompt_id
    table = dict.fromkeys(plain, 0.0) | {(first, 1): 50.0}
    policy = AdaptiveCuts((Fit(2, 0.0, 1.0, 1.0),), confidence=1.0, first_wave=4, min_gain=0.1)
    found = decode(tiny_prompts, policy, table_reward(table), max_rows=8)
    for key, candidate in found.items():
        if key[0] == first:
            expected = plain[key].finish_reason if key[1] == 1 else "cut" if key[1] < 4 else "skipped"
            assert candidate.finish_reason == expected
            assert candidate.token_ids == plain[key].token_ids[: {"cut": 2, "skipped": 0}.get(expected)]
        else:
            assert (candidate.finish_reason, candidate.token_ids) == (plain[key].finish_reason, plain[key].token_ids)
