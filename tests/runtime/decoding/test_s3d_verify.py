"""Both acceptance rules are exactly lossless: by enumeration, and by counting strings."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutSchedule
from runtime.decoding.s3d import verify as module
from runtime.decoding.s3d.adapter import S3DAdapter, S3DConfig
from runtime.decoding.s3d.rounds import S3DDecoding
from runtime.decoding.s3d.verify import (
    Block,
    Drafts,
    RuleName,
    acceptance,
    correction,
    draft,
    draft_in_turn,
    verify,
)
from runtime.decoding.sampling import SamplingConfig, log_probabilities, penalise
from runtime.models import LoadedModel, encode_prompt
from runtime.randomness import row_key
from runtime.records import Prompt

V, LENGTH, N_ROWS = 5, 3, 20_000
Law = Callable[[tuple[int, ...]], Tensor]  # tokens so far -> probabilities of the next


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("seed", range(20))
def test_the_classic_rule_has_the_targets_law_exactly(k: int, seed: int, told: bool) -> None:
    """All drafts of a block with their chances, against the product of the target's laws; told: a draft's law depends
    on the draft before it, as with a sampler head."""
    random = torch.Generator().manual_seed(seed)
    sharp = 1 + 3 * (seed % 3)  # flat to peaked, and some tokens impossible for one of the two
    p = {
        prefix: _softmax(torch.randn(V, generator=random, dtype=torch.float64) * sharp, seed % 2)
        for n in range(k + 1)
        for prefix in product(range(V), repeat=n)
    }
    free = [_softmax(torch.randn(V, generator=random, dtype=torch.float64) * sharp, seed % 2) for _ in range(k)]
    q = {
        prefix: _softmax(torch.randn(V, generator=random, dtype=torch.float64) * sharp, seed % 2) if told else free[n]
        for n in range(k)
        for prefix in product(range(V), repeat=n)
    }
    found: dict[tuple[int, ...], float] = {}

    def add(prefix: tuple[int, ...], law: Tensor, chance: float) -> None:
        """One more token of this law, then the target's own up to the block's length."""
        for token in range(V):
            share = chance * float(law[token] / law.sum())
            if len(prefix) == k:
                found[(*prefix, token)] = found.get((*prefix, token), 0.0) + share
            elif share:
                add((*prefix, token), p[(*prefix, token)], share)

    def walk(prefix: tuple[int, ...], chance: float) -> None:
        place = len(prefix)
        if place == k:
            return add(prefix, p[prefix], chance)
        for token in range(V):
            drafted = chance * float(q[prefix][token])
            if drafted:
                stays = min(1.0, float(acceptance(p[prefix], q[prefix], torch.tensor(token))))
                walk((*prefix, token), drafted * stays)
                if stays < 1:
                    add(prefix, correction(p[prefix], q[prefix]), drafted * (1 - stays))
        return None

    walk((), 1.0)
    for tokens in product(range(V), repeat=k + 1):
        exact = math.prod(float(p[tokens[:n]][tokens[n]]) for n in range(k + 1))
        assert found.get(tokens, 0.0) == pytest.approx(exact, abs=1e-12)


def _softmax(logits: Tensor, n_impossible: int) -> Tensor:
    logits[
        torch.randperm(V, generator=torch.Generator().manual_seed(int(logits.sum() * 100)))[:n_impossible]
    ] = -torch.inf
    return logits.softmax(0)


class Toy:
    """A target that looks at the last two tokens, and a draft that knows the last committed one only, and where it is
    told, the draft before."""

    def __init__(self, sharp: float = 1.5, told: bool = False) -> None:
        random = torch.Generator().manual_seed(1)
        self.target = sharp * torch.randn(V + 1, V + 1, V, generator=random, dtype=torch.float64)
        self.drafted = self.target.mean(0)[:, None] + torch.randn(V + 1, 4, V, generator=random, dtype=torch.float64)
        self.told = sharp * torch.randn(V, V, generator=random, dtype=torch.float64) if told else None

    def strings(self, sampling: SamplingConfig, k: int, rule: RuleName) -> Tensor:
        """Tokens (rows, LENGTH) of many rows, decoded in rounds; V is what came before the first."""
        keys = torch.tensor([row_key(3, "p", index) for index in range(N_ROWS)])
        tokens = torch.full((N_ROWS, 2 + LENGTH + k), V)
        n_done, row = torch.zeros(N_ROWS, dtype=torch.long), torch.arange(N_ROWS)
        seen = torch.zeros(N_ROWS, V, dtype=torch.bool) if sampling.repetition_penalty != 1 else None
        while int(n_done.min()) < LENGTH:
            block = Block(keys, n_done, (LENGTH - n_done).clamp(max=k + 1), seen, sampling)
            before, last = tokens[row, n_done], tokens[row, n_done + 1]
            drafts = self.drafts(block, self.drafted[last, :k], rule) if k else None
            fed = [before, last] if drafts is None else [before, last, *drafts.tokens.unbind(1)]
            logits = torch.stack([self.target[a, b] for a, b in zip(fed, fed[1:], strict=False)], 1)
            verdict = verify(block, drafts, logits, rule)
            for place in range(k + 1):
                is_kept = place < verdict.counts
                at = (n_done + 2 + place)[is_kept]
                tokens[row[is_kept], at] = verdict.tokens[is_kept, place]
                if seen is not None:
                    seen[row[is_kept], verdict.tokens[is_kept, place]] = True
            n_done = n_done + verdict.counts
        return tokens[:, 2 : 2 + LENGTH]

    def drafts(self, block: Block, logits: Tensor, rule: RuleName) -> Drafts:
        """Those of a round."""
        told = self.told
        if told is None:
            return draft(block, logits, rule)

        def logits_after(place: int, before: Tensor | None) -> Tensor:
            return logits[:, place] if before is None else logits[:, place] + told[before]

        return draft_in_turn(block, logits.shape[1], logits_after, rule)

    def law(self, sampling: SamplingConfig) -> Tensor:
        """Exact probability of every string, (V,) * LENGTH."""
        exact = torch.zeros((V,) * LENGTH, dtype=torch.float64)
        for string in product(range(V), repeat=LENGTH):
            chance, known = 1.0, (V, V, *string)
            for n in range(LENGTH):
                seen = torch.zeros(1, V, dtype=torch.bool)
                seen[0, list(string[:n])] = True
                logits = penalise(self.target[known[n], known[n + 1]][None], seen, sampling.repetition_penalty)
                chance *= float(log_probabilities(logits, sampling)[0, string[n]].exp())
            exact[string] = chance
        return exact


def statistic(strings: Tensor, exact: Tensor) -> float:
    """Chi-square in standard deviations; cells with less than 5 expected are pooled, impossible ones stay empty."""
    index = strings[:, 0]
    for n in range(1, strings.shape[1]):
        index = index * exact.shape[n] + strings[:, n]
    counts = torch.bincount(index, minlength=exact.numel()).double()
    expected = exact.flatten() * len(strings)
    assert counts[expected == 0].sum() == 0
    is_large = expected >= 5
    counts = torch.cat((counts[is_large], counts[~is_large].sum()[None]))
    expected = torch.cat((expected[is_large], expected[~is_large].sum()[None]))
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    value = float(((counts - expected) ** 2 / expected).sum())
    return (value - freedom) / math.sqrt(2 * freedom)


SETTINGS: Sequence[dict[str, Any]] = (
    {},
    {"temperature": 0.6},
    {"top_k": 3},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 1.5, "top_k": 4, "top_p": 0.9},
)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("k", "told"), [(1, False), (2, False), (4, False), (2, True), (4, True)])
def test_strings_of_the_classic_rule_follow_the_target(settings: dict[str, Any], k: int, told: bool) -> None:
    toy, sampling = Toy(told=told), SamplingConfig(**settings)
    assert statistic(toy.strings(sampling, k, "classic"), toy.law(sampling)) < 5


@pytest.mark.parametrize("settings", SETTINGS)
def test_strings_of_the_coupled_rule_follow_the_target_and_are_those_without_drafts(settings: dict[str, Any]) -> None:
    toy, sampling = Toy(), SamplingConfig(**settings)
    plain = toy.strings(sampling, 0, "coupled")
    assert statistic(plain, toy.law(sampling)) < 5
    for k in (1, 2, 4):
        assert torch.equal(toy.strings(sampling, k, "coupled"), plain)
        assert torch.equal(Toy(told=True).strings(sampling, k, "coupled"), plain)


def test_the_count_finds_drafts_whose_law_is_not_the_one_that_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a sampler head had changed what is drawn, but not what is recorded."""
    toy, sampling = Toy(told=True), SamplingConfig()
    drafts = toy.drafts
    monkeypatch.setattr(toy, "drafts", lambda block, logits, rule: replace(drafts(block, logits, rule), logits=logits))
    assert statistic(toy.strings(sampling, 2, "classic"), toy.law(sampling)) > 5


def test_the_count_finds_a_rule_that_is_slightly_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    toy, sampling = Toy(), SamplingConfig()
    monkeypatch.setattr(module, "correction", lambda p, q: p)
    assert statistic(toy.strings(sampling, 2, "classic"), toy.law(sampling)) > 5


def test_greedy_is_the_same_by_either_rule() -> None:
    toy, sampling = Toy(), SamplingConfig(temperature=0)
    plain = toy.strings(sampling, 0, "coupled")
    assert torch.equal(toy.strings(sampling, 3, "classic"), plain)


def test_a_draft_that_the_target_never_says_is_never_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with the smallest uniform number there is."""
    monkeypatch.setattr(module, "uniform", lambda keys, position, n: torch.zeros(len(keys), n))
    sampling = SamplingConfig()
    block = Block(torch.arange(50), torch.zeros(50, dtype=torch.long), torch.full((50,), 2), None, sampling)
    logits = torch.zeros(50, 2, V)
    logits[:, :, 3] = -torch.inf
    drafted = torch.full((50, 1, V), -torch.inf)
    drafted[:, :, 3] = 0
    verdict = verify(block, draft(block, drafted, "classic"), logits, "classic")
    assert verdict.accepted.tolist() == [0] * 50
    assert not (verdict.tokens[:, 0] == 3).any()


@pytest.mark.slow
@pytest.mark.parametrize("sampler_width", [0, pytest.param(8, marks=pytest.mark.long)])
@pytest.mark.parametrize("rule", ["classic", "coupled"])
def test_strings_of_the_engine_follow_the_model(
    tiny_policy: LoadedModel, tiny_prompts: Sequence[Prompt], rule: RuleName, sampler_width: int
) -> None:
    """10,000 candidates of three tokens; top_k leaves 64 strings."""
    sampling = SamplingConfig(n=10_000, top_k=4, max_new_tokens=LENGTH)
    policy = replace(tiny_policy)
    torch.manual_seed(0)
    config = S3DConfig(2, 2, 2, 0, 0.0, "embeddings", policy.content_hash, sampler_width=sampler_width)
    adapter = S3DAdapter(policy, config).requires_grad_(False)
    if adapter.sampler is not None:
        adapter.sampler.up.normal_(std=0.1)
    s3d = S3DDecoding(adapter, 2, rule)
    engine = Engine(policy, sampling, CutSchedule(), None, sampling.n, s3d=s3d)
    engine.is_stop[:] = False  # strings of one length
    (found,) = engine.generate(tiny_prompts[:1])
    ids = encode_prompt(policy.tokenizer, tiny_prompts[0].messages, "chat")
    exact = torch.zeros(261, 261, 261, dtype=torch.float64)
    _fill(policy, sampling, ids, [], 1.0, exact)
    assert exact.sum() == pytest.approx(1)
    assert statistic(torch.tensor([c.token_ids for c in found]), exact) < 5


@torch.no_grad()
def _fill(
    policy: LoadedModel, sampling: SamplingConfig, prompt: list[int], string: list[int], chance: float, exact: Tensor
) -> None:
    if len(string) == LENGTH:
        exact[tuple(string)] = chance
        return
    logits = policy.model(torch.tensor([prompt + string])).logits[:, -1]
    law = log_probabilities(logits, sampling)[0].exp()
    for token in law.nonzero().flatten().tolist():
        _fill(policy, sampling, prompt, [*string, token], chance * float(law[token]), exact)
