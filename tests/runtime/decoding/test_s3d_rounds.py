"""Self-speculative decoding changes no candidate: greedy and sampled, with cuts, stops and refills, for any k."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.decoding.adaptive import AdaptiveCuts, Fit
from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutPolicy, CutSchedule, MemoryCuts
from runtime.decoding.s3d import rounds
from runtime.decoding.s3d.adapter import S3DAdapter, load_adapter
from runtime.decoding.s3d.rounds import S3DDecoding
from runtime.decoding.s3d.verify import Block, Drafts, RuleName
from runtime.decoding.sampling import SamplingConfig
from runtime.errors import ConfigError, ModelError
from runtime.kv.arena import KVShape
from runtime.models import LoadedModel, encode_prompt, load_policy
from runtime.randomness import row_key
from runtime.records import Candidate, Message, Prompt
from runtime.rewards.classifier import ClassifierReward
from runtime.starter import path, s3d_path

Key = tuple[str, int]
Decode = Callable[..., dict[Key, Candidate]]
Script = Callable[[Mapping[Key, Candidate]], list[int]]


def skip(policy: LoadedModel, k: int, n_first: int = 1, n_last: int = 1, rule: RuleName = "coupled") -> S3DDecoding:
    """Always k drafts from untrained layers."""
    return S3DDecoding(S3DAdapter.skip_only(policy, n_first, n_last, max(k, 1)), k, rule)


def auto(policy: LoadedModel, k: int = 4) -> S3DDecoding:
    """As many drafts as pay by a clock that ticks at each look."""
    ticks: Iterator[int] = count()
    return S3DDecoding(S3DAdapter.skip_only(policy, 1, 1, k), clock=lambda: float(next(ticks)))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Drafts that are right but for every third or so; returns how many stayed, round by round and row by row."""
    accepted: list[int] = []

    def install(plain: Mapping[Key, Candidate]) -> list[int]:
        by_key = {row_key(0, *key): candidate.token_ids for key, candidate in plain.items()}

        def draft(block: Block, logits: Tensor, rule: RuleName) -> Drafts:
            k = logits.shape[1]
            rows = []
            for key, start in zip(block.keys.tolist(), block.start.tolist(), strict=True):
                known = [*by_key[key][start : start + k], *[7] * k][:k]
                rows.append([token if hash((key, start + i)) % 3 else 9 for i, token in enumerate(known)])
            return Drafts(torch.tensor(rows), logits)

        def verify(*args: Any) -> Any:
            verdict = original(*args)
            accepted.extend(verdict.accepted.tolist())
            return verdict

        original = rounds.verify
        monkeypatch.setattr(rounds, "draft", draft)
        monkeypatch.setattr(rounds, "verify", verify)
        return accepted

    return install


@pytest.mark.parametrize("kept", [(1, 0), (0, 1), (1, 1), (2, 1), (2, 2), (4, 0)])
@pytest.mark.parametrize("k", [0, 1, 4, 6])
def test_greedy_equals_plain_decoding_for_all_kept_layers(
    decode: Decode, tiny_policy: LoadedModel, tiny_prompts: Sequence[Prompt], kept: tuple[int, int], k: int
) -> None:
    plain = decode(tiny_prompts, temperature=0, n=1)
    assert decode(tiny_prompts, temperature=0, n=1, s3d=skip(tiny_policy, k, *kept)) == plain


@pytest.mark.parametrize("n", [1, 3, 8, 16])
@pytest.mark.parametrize("k", range(7))
def test_candidates_are_those_of_plain_decoding_for_any_rows_and_k(
    decode: Decode, tiny_policy: LoadedModel, tiny_prompts: Sequence[Prompt], script: Script, n: int, k: int
) -> None:
    plain = decode(tiny_prompts, n=n)
    accepted = script(plain)
    assert decode(tiny_prompts, n=n, s3d=skip(tiny_policy, k)) == plain
    if k:
        assert {0, 1, k} <= set(accepted)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 0.7, "top_k": 20},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 1.3, "temperature": 0, "max_new_tokens": 60},
        {"max_new_tokens": 1},
        {"max_new_tokens": 3},
        {"stop": ("a", "never written")},
        {"stop": ("e", "t", "ab"), "max_new_tokens": 60},
    ],
)
@pytest.mark.parametrize("max_rows", [8, 20])
def test_every_sampling_setting_keeps_its_candidates(
    decode: Decode,
    tiny_policy: LoadedModel,
    tiny_prompts: Sequence[Prompt],
    script: Script,
    settings: dict[str, Any],
    max_rows: int,
) -> None:
    plain = decode(tiny_prompts, **settings)
    script(plain)
    for k in (1, 4):
        assert decode(tiny_prompts, max_rows=max_rows, s3d=skip(tiny_policy, k), **settings) == plain


def test_stop_strings_end_answers_inside_a_block(
    decode: Decode, tiny_policy: LoadedModel, tiny_prompts: Sequence[Prompt], script: Script
) -> None:
    free = decode(tiny_prompts)
    texts = "".join(c.response for c in free.values())
    stop = max((texts[i : i + 2] for i in range(len(texts) - 1) if texts[i : i + 2].isascii()), key=texts.count)
    plain = decode(tiny_prompts, stop=(stop,))
    assert {c.finish_reason for c in plain.values()} > {"stop"}
    script(free)
    assert decode(tiny_prompts, stop=(stop,), s3d=skip(tiny_policy, 5)) == plain


def test_every_end_token_stops_inside_a_block(
    decode: Decode, tiny_policy_dir: Path, tiny_prompts: Sequence[Prompt], script: Script
) -> None:
    free = decode(tiny_prompts)
    loaded = load_policy(str(tiny_policy_dir))
    loaded.model.generation_config.eos_token_id = [loaded.tokenizer.eos_token_id, free["prompt-0", 0].token_ids[3]]
    plain = decode(tiny_prompts, policy=loaded)
    accepted = script(free)
    assert decode(tiny_prompts, policy=loaded, s3d=skip(loaded, 6)) == plain
    assert max(accepted) == 6


def test_drafts_that_never_stay_change_nothing(
    decode: Decode, tiny_policy: LoadedModel, tiny_prompts: Sequence[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = decode(tiny_prompts)
    seen: list[int] = []

    def draft(block: Block, logits: Tensor, rule: RuleName) -> Drafts:
        seen.append(len(block.keys))
        return Drafts(torch.full(logits.shape[:2], unused), logits)

    unused = min(set(range(261)).difference(*(c.token_ids for c in plain.values())))
    monkeypatch.setattr(rounds, "draft", draft)
    assert decode(tiny_prompts, s3d=skip(tiny_policy, 4)) == plain
    assert len(seen) > 40


CUTS: dict[str, CutPolicy] = {
    "schedule": CutSchedule((4, 10, 20), (0.5, 0.5, 0.5)),
    "contrast": CutSchedule((1, 7, 8), (0.6, 0.6, 0.9), contrast=2),
    "adaptive": AdaptiveCuts((Fit(5, 0.0, 1.0, 0.1), Fit(12, 0.0, 1.0, 0.05)), 0.8, first_wave=3),
}


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("max_rows", [8, 24])
@pytest.mark.parametrize("k", [1, 4, None])
def test_cuts_are_those_of_plain_decoding(
    decode: Decode,
    tiny_policy: LoadedModel,
    tiny_reward: LoadedModel,
    tiny_prompts: Sequence[Prompt],
    script: Script,
    name: str,
    max_rows: int,
    k: int | None,
) -> None:
    """The same texts, cuts, scores and so the same winners."""
    reward = ClassifierReward(tiny_reward)
    free = decode(tiny_prompts)
    plain = decode(tiny_prompts, CUTS[name], reward, max_rows)
    assert {"cut", "eos"} <= {c.finish_reason for c in plain.values()}
    script(free)
    s3d = auto(tiny_policy) if k is None else skip(tiny_policy, k)
    assert_equal(decode(tiny_prompts, CUTS[name], reward, max_rows, s3d=s3d), plain)


@pytest.mark.parametrize("k", [1, 4, None])
@pytest.mark.parametrize("n_rows_whole", [2.5, 3.0])
def test_memory_cuts_are_those_of_plain_decoding(
    decode: Decode,
    tiny_policy: LoadedModel,
    tiny_reward: LoadedModel,
    tiny_prompts: Sequence[Prompt],
    script: Script,
    k: int | None,
    n_rows_whole: float,
) -> None:
    model = tiny_policy.model
    longest = max(len(encode_prompt(tiny_policy.tokenizer, p.messages, "chat")) for p in tiny_prompts)
    budget = KVShape.of(model).n_bytes(longest + int(n_rows_whole * 101), model.dtype)
    reward, n_new = ClassifierReward(tiny_reward), {"max_new_tokens": 100}
    plain = decode(tiny_prompts, MemoryCuts(0.5), reward, kv_budget=budget, **n_new)
    assert "cut" in {c.finish_reason for c in plain.values()}
    script(decode(tiny_prompts, **n_new))
    s3d = auto(tiny_policy) if k is None else skip(tiny_policy, k)
    assert_equal(decode(tiny_prompts, MemoryCuts(0.5), reward, kv_budget=budget, s3d=s3d, **n_new), plain)


def test_kv_budget_is_as_large_as_without_s3d(
    decode: Decode, tiny_policy: LoadedModel, tiny_prompts: Sequence[Prompt]
) -> None:
    """A row drafts no further than it may go, so that the budget that just fits one prompt still does."""
    model = tiny_policy.model
    n_prompt = len(encode_prompt(tiny_policy.tokenizer, tiny_prompts[0].messages, "chat"))
    budget = KVShape.of(model).n_bytes(n_prompt + 8 * 41, model.dtype)
    plain = decode(tiny_prompts[:1], kv_budget=budget)
    assert decode(tiny_prompts[:1], kv_budget=budget, s3d=skip(tiny_policy, 6)) == plain
    assert {c.status for c in plain.values()} == {"ok"}


def test_the_starter_draws_the_same_with_its_own_drafts(decode: Decode) -> None:
    """Real drafts, which stay now and then, over all kinds of kept layers."""
    policy = load_policy(str(path("policy")), "float64")
    asked = [Prompt(text, (Message("user", text),), "g") for text in ("What is 3 plus 4?", "1 + 2", "Add 30 and 12.")]
    for settings in ({"temperature": 0}, {}):
        plain = decode(asked, policy=policy, n=4, **settings)
        for n_first, n_last, k in ((7, 1, 2), (2, 2, 4), (3, 3, 6), (1, 0, 3)):
            assert decode(asked, policy=policy, n=4, s3d=skip(policy, k, n_first, n_last), **settings) == plain


def test_the_shipped_adapter_changes_no_candidate_and_is_accepted(
    decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(str(path("policy")), "float64")
    adapter, accepted = load_adapter(s3d_path(), policy), []
    original = rounds.verify

    def verify(*args: Any) -> Any:
        accepted.extend(original(*args).accepted.tolist())
        return original(*args)

    monkeypatch.setattr(rounds, "verify", verify)
    asked = [Prompt(text, (Message("user", text),), "g") for text in ("What is 3 plus 4?", "1 + 2", "Add 30 and 12.")]
    for settings in ({"temperature": 0}, {}, {"repetition_penalty": 1.1, "top_p": 0.95}):
        plain = decode(asked, policy=policy, n=4, **settings)
        for k in (1, 4):
            assert decode(asked, policy=policy, n=4, s3d=S3DDecoding(adapter, k), **settings) == plain
    assert sum(accepted) > len(accepted)


@pytest.mark.shared
@pytest.mark.parametrize("k", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(6, marks=pytest.mark.slow)])
def test_a_trained_model_draws_the_same_with_its_own_drafts(shared_models: Path, k: int) -> None:
    policy = load_policy(str(shared_models / "stories3m"))
    texts = ("Once upon a time", "Lily", "The dog and the cat went to the park because")
    asked = [Prompt(text, (Message("user", text),), "g") for text in texts]
    for temperature in (0.0, 1.0):
        sampling = SamplingConfig(n=4, temperature=temperature, max_new_tokens=60)
        plain, *others = (
            list(Engine(policy, sampling, CutSchedule(), None, 8, "text", s3d=s3d).generate(asked))
            for s3d in (None, skip(policy, k, 1, 1), skip(policy, k, 2, 1))
        )
        assert others == [plain, plain]


@pytest.mark.parametrize("rule", ["coupled", "classic"])
def test_broken_logits_are_reported(
    decode: Decode, tiny_policy_dir: Path, tiny_prompts: Sequence[Prompt], rule: RuleName
) -> None:
    loaded = load_policy(str(tiny_policy_dir))
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        decode(tiny_prompts, policy=loaded, s3d=skip(loaded, 3, rule=rule))


def test_impossible_settings_are_refused(tiny_policy: LoadedModel) -> None:
    adapter = S3DAdapter.skip_only(tiny_policy, 1, 1, 2)
    with pytest.raises(ConfigError, match="needs a clock"):
        S3DDecoding(adapter)
    with pytest.raises(ConfigError, match="k = -1"):
        S3DDecoding(adapter, -1)
    with pytest.raises(ModelError, match="k = 3"):
        S3DDecoding(adapter, 3)


def assert_equal(found: Mapping[Key, Candidate], plain: Mapping[Key, Candidate]) -> None:
    """Scores up to the rounding of batches of other shape."""
    assert {key: replace(c, cuts=()) for key, c in found.items()} == {
        key: replace(c, cuts=()) for key, c in plain.items()
    }
    for key, candidate in plain.items():
        assert [(cut.n_tokens, cut.kept) for cut in found[key].cuts] == [(c.n_tokens, c.kept) for c in candidate.cuts]
        assert [cut.score for cut in found[key].cuts] == pytest.approx([c.score for c in candidate.cuts], abs=1e-5)
