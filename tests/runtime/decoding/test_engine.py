"""Sampling with the engine: the same candidate for any batch shape; errors are rows; stops are respected."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutSchedule
from runtime.decoding.sampling import SamplingConfig
from runtime.errors import ConfigError, ModelError
from runtime.kv.attention import check_supported
from runtime.models import LoadedModel, encode_prompt, load_policy
from runtime.records import Candidate, Message, Prompt
from runtime.rewards.classifier import ClassifierReward

Decode = Callable[..., dict[tuple[str, int], Candidate]]


@pytest.mark.parametrize("max_rows", [8, 13, 100])
def test_candidates_do_not_depend_on_batch_or_order(
    decode: Decode, tiny_prompts: Sequence[Prompt], max_rows: int
) -> None:
    plain = decode(tiny_prompts)
    assert {c.finish_reason for c in plain.values()} == {"eos", "length"}
    assert len({c.token_ids for c in plain.values()}) == len(plain)
    assert decode(tiny_prompts, max_rows=max_rows) == plain
    assert decode(tiny_prompts[::-1], max_rows=max_rows) == plain
    assert decode(tiny_prompts[2:3], max_rows=max_rows).items() <= plain.items()


@pytest.mark.parametrize("settle_every", [2, 5, 64])
@pytest.mark.parametrize("max_rows", [8, 100])
def test_looking_seldom_for_finished_rows_changes_nothing(
    tiny_policy: LoadedModel, tiny_prompts: Sequence[Prompt], tiny_reward: LoadedModel, settle_every: int, max_rows: int
) -> None:
    for cuts in (CutSchedule(), CutSchedule((3, 11), (0.6, 0.5))):
        sampling = SamplingConfig(n=8, max_new_tokens=40)
        reward = ClassifierReward(tiny_reward)
        often, seldom = (
            list(Engine(tiny_policy, sampling, cuts, reward, max_rows, settle_every=every).generate(tiny_prompts))
            for every in (1, settle_every)
        )
        for one, other in zip(sum(often, []), sum(seldom, []), strict=True):
            assert (one.token_ids, one.finish_reason, one.cut_at_token) == (
                other.token_ids,
                other.finish_reason,
                other.cut_at_token,
            )


def test_fewer_candidates_are_the_first_ones(decode: Decode, tiny_prompts: Sequence[Prompt]) -> None:
    assert decode(tiny_prompts, n=3, max_rows=3).items() <= decode(tiny_prompts).items()


def test_seed_and_prompt_id_change_the_candidates(decode: Decode, tiny_prompts: Sequence[Prompt]) -> None:
    prompt = tiny_prompts[0]
    ids = {
        decode([prompt])[prompt.prompt_id, 0].token_ids,
        decode([prompt], seed=1)[prompt.prompt_id, 0].token_ids,
        decode([replace(prompt, prompt_id="other")])["other", 0].token_ids,
    }
    assert len(ids) == 3


def test_first_token_follows_the_model(
    decode: Decode, tiny_policy: LoadedModel, tiny_prompts: Sequence[Prompt]
) -> None:
    """400 candidates against the model's own probabilities of the four most likely first tokens."""
    prompt = tiny_prompts[0]
    ids = encode_prompt(tiny_policy.tokenizer, prompt.messages, "chat")
    with torch.no_grad():
        probabilities = tiny_policy.model(torch.tensor([ids])).logits[0, -1].softmax(0)
    found = decode([prompt], n=400, max_rows=400, max_new_tokens=1)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in found.values()]), minlength=261)
    for token in probabilities.topk(4).indices.tolist():
        p = probabilities[token].item()
        assert abs(counts[token].item() - 400 * p) < 5 * (400 * p * (1 - p)) ** 0.5


def test_response_is_the_text_without_the_end_token(
    decode: Decode, tiny_policy: LoadedModel, tiny_prompts: Sequence[Prompt]
) -> None:
    for candidate in decode(tiny_prompts).values():
        is_eos = candidate.finish_reason == "eos"
        assert (candidate.token_ids[-1] == tiny_policy.tokenizer.eos_token_id) == is_eos
        assert candidate.n_tokens == 40 or is_eos
        text = tiny_policy.tokenizer.decode(candidate.token_ids, skip_special_tokens=True)
        assert candidate.response == text and "<end>" not in text


def test_a_stop_string_ends_the_answer_before_it(
    decode: Decode, tiny_policy: LoadedModel, tiny_prompts: Sequence[Prompt]
) -> None:
    plain = decode(tiny_prompts)
    texts = "".join(c.response for c in plain.values())
    stop = max((texts[i : i + 2] for i in range(len(texts) - 1) if texts[i : i + 2].isascii()), key=texts.count)
    found = decode(tiny_prompts, stop=(stop, "never written"))
    assert {c.finish_reason for c in found.values()} > {"stop"}
    for key, candidate in found.items():
        whole, _, _ = plain[key].response.partition(stop)
        assert candidate.response == whole
        assert candidate.token_ids == plain[key].token_ids[: candidate.n_tokens]
        assert (candidate.finish_reason == "stop") == (stop in plain[key].response)


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.3}, {"repetition_penalty": 1.3, "top_k": 20}])
def test_repetition_penalty_equals_generate(
    tiny_policy_dir: Path, tiny_prompts: Sequence[Prompt], settings: dict[str, float]
) -> None:
    """Greedy, where transformers and the engine must agree token by token."""
    loaded = load_policy(str(tiny_policy_dir))
    original = copy.deepcopy(loaded.model)
    sampling = SamplingConfig(n=2, temperature=0, max_new_tokens=40, **settings)  # type: ignore[arg-type]
    results = Engine(loaded, sampling, CutSchedule(), None, 4).generate(tiny_prompts)
    for prompt, candidates in zip(tiny_prompts, results, strict=True):
        ids = torch.tensor([encode_prompt(loaded.tokenizer, prompt.messages, "chat")])
        expected = original.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40, repetition_penalty=1.3
        )
        assert [list(c.token_ids) for c in candidates] == [expected[0, ids.shape[1] :].tolist()] * 2


def test_every_end_token_stops(decode: Decode, tiny_policy_dir: Path, tiny_prompts: Sequence[Prompt]) -> None:
    plain = decode(tiny_prompts)
    extra = plain["prompt-0", 0].token_ids[3]
    loaded = load_policy(str(tiny_policy_dir))
    loaded.model.generation_config.eos_token_id = [loaded.tokenizer.eos_token_id, extra]
    for key, candidate in decode(tiny_prompts, policy=loaded).items():
        full = plain[key].token_ids
        expected = full[: full.index(extra) + 1] if extra in full else full
        assert candidate.token_ids == expected
        is_eos = expected[-1] in (extra, 1)
        assert candidate.finish_reason == ("eos" if is_eos else "length")
        shown = expected[:-1] if is_eos else expected
        assert candidate.response == loaded.tokenizer.decode(shown, skip_special_tokens=True)
    assert decode(tiny_prompts, policy=loaded)["prompt-0", 0].n_tokens <= 4


def test_too_long_prompt_is_error_rows_and_the_others_go_on(decode: Decode, tiny_prompts: Sequence[Prompt]) -> None:
    long = Prompt("long", (Message("user", "x" * 230),), "g")
    found = decode([tiny_prompts[0], long, tiny_prompts[1]])
    for index in range(8):
        row = found["long", index]
        assert (row.status, row.finish_reason, row.token_ids) == ("error", "error", ())
        assert row.error == "prompt of 233 tokens + max_new_tokens = 40 exceeds the context of 256 tokens"
    assert {key: row for key, row in found.items() if key[0] != "long"} == decode(tiny_prompts[:2])


def test_prompt_that_exactly_fits_is_decoded(decode: Decode) -> None:
    prompt = Prompt("fits", (Message("user", "x" * 213),), "g")
    assert {c.status for c in decode([prompt]).values()} == {"ok"}


def test_only_bad_prompts_and_no_prompts(decode: Decode) -> None:
    assert decode([]) == {}
    assert {c.status for c in decode([Prompt("long", (Message("user", "x" * 999),), "g")]).values()} == {"error"}


def test_results_arrive_before_the_end_and_progress_counts_prompts(
    tiny_policy: LoadedModel, tiny_prompts: Sequence[Prompt]
) -> None:
    engine = Engine(tiny_policy, SamplingConfig(n=8, max_new_tokens=20), CutSchedule(), None, 8)
    seen: list[tuple[int, int]] = []
    next(engine.generate(tiny_prompts, lambda done, total: seen.append((done, total))))
    assert seen == [(1, 6)]
    list(engine.generate(tiny_prompts, lambda done, total: seen.append((done, total))))
    assert seen[1:] == [(done, 6) for done in range(1, 7)]


def test_rows_are_refilled_across_prompts(
    tiny_policy: LoadedModel, tiny_prompts: Sequence[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second prompt starts while rows of the first still run, and each prompt is prefilled once."""
    calls: list[tuple[int, ...]] = []
    forward = LlamaModel.forward

    def counted(self: LlamaModel, *args: object, **kwargs: torch.Tensor) -> object:
        calls.append(tuple(kwargs["input_ids"].shape))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    engine = Engine(tiny_policy, SamplingConfig(n=4, max_new_tokens=40), CutSchedule(), None, 10)
    list(engine.generate(tiny_prompts))
    prefills = [shape[0] for shape in calls if shape[1] > 1]
    assert prefills[0] == 2 and sum(prefills) == len(tiny_prompts)
    steps = [shape[0] for shape in calls if shape[1] == 1]
    assert max(steps) <= 10
    assert any(later > earlier for earlier, later in zip(steps, steps[1:], strict=False))


def test_n_above_max_rows_names_both(tiny_policy: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="n = 17 exceeds max_rows = 16"):
        Engine(tiny_policy, SamplingConfig(n=17), CutSchedule(), None, 16)


def test_cuts_need_a_reward(tiny_policy: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="set a reward"):
        Engine(tiny_policy, SamplingConfig(), CutSchedule((8,), (0.5,)), None, 16)


def test_missing_chat_template_stops_the_run(
    tiny_policy: LoadedModel, tiny_prompts: Sequence[Prompt], make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    engine = Engine(replace(tiny_policy, tokenizer=make_tokenizer(None)), SamplingConfig(), CutSchedule(), None, 16)
    with pytest.raises(ModelError, match="prompt_format"):
        engine.generate(tiny_prompts)


def test_unsupported_architectures_are_refused() -> None:
    with pytest.raises(ModelError, match="'gpt2' is not supported"):
        check_supported(GPT2Config())
    with pytest.raises(ModelError, match="bidirectional"):
        check_supported(Gemma3TextConfig(use_bidirectional_attention=True))
    config = Qwen2Config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ModelError, match="rope type 'dynamic'"):
        check_supported(config)


def test_logits_that_are_not_finite_are_reported(tiny_policy_dir: Path, tiny_prompts: Sequence[Prompt]) -> None:
    loaded = load_policy(str(tiny_policy_dir))
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight[5] = float("nan")
    engine = Engine(loaded, SamplingConfig(), CutSchedule(), None, 16)
    with pytest.raises(ModelError, match="not finite"):
        list(engine.generate(tiny_prompts))


def test_bfloat16_decodes_the_same_for_any_batch(
    decode: Decode, tiny_policy_dir: Path, tiny_prompts: Sequence[Prompt]
) -> None:
    """Up to rounding: in half precision a few candidates may part, but none fails."""
    policy = load_policy(str(tiny_policy_dir), dtype="bfloat16")
    wide, narrow = (decode(tiny_prompts, policy=policy, max_rows=rows) for rows in (48, 8))
    assert {c.status for c in wide.values()} == {"ok"}
    assert sum(wide[key] == narrow[key] for key in wide) >= 0.8 * len(wide)


def test_saved_model_does_not_remember_the_engine(tiny_policy_dir: Path, tmp_path: Path) -> None:
    loaded = load_policy(str(tiny_policy_dir))
    Engine(loaded, SamplingConfig(), CutSchedule(), None, 16)
    loaded.model.save_pretrained(tmp_path)
    assert "winnow" not in (tmp_path / "config.json").read_text()
