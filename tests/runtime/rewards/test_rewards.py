"""Scores: the same alone and in a batch, partial like final, failures per row."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from runtime.errors import ModelError
from runtime.models import LoadedModel, encode_answer, load_classifier
from runtime.records import Message, Prompt
from runtime.rewards import incremental
from runtime.rewards.classifier import ClassifierReward
from runtime.rewards.combined import CombinedReward
from runtime.rewards.likelihood import LikelihoodReward
from runtime.rewards.protocol import Reward, Score
from runtime.rewards.verifier import FunctionReward

RESPONSES = ("5", "the answer is five, because two and three make five", "", "12 - 7 = 5", "no", "é and more")


@pytest.fixture(params=["classifier", "likelihood", "likelihood_sum", "combined"])
def reward(request: pytest.FixtureRequest, tiny_policy: LoadedModel, tiny_reward: LoadedModel) -> Reward:
    """The model-based rewards, with batches smaller than the input."""
    classifier = ClassifierReward(tiny_reward, batch_size=4)
    if request.param == "classifier":
        return classifier
    likelihood = LikelihoodReward(tiny_policy, "chat", 4, "sum" if request.param == "likelihood_sum" else "mean")
    return CombinedReward([(1.0, classifier), (-0.5, likelihood)]) if request.param == "combined" else likelihood


def values(scores: Sequence[Score]) -> list[float]:
    assert all(score.error is None for score in scores)
    return [score.value for score in scores if score.value is not None]


def test_batch_scores_equal_single_scores(reward: Reward, tiny_prompts: Sequence[Prompt]) -> None:
    batch = values(reward.score(tiny_prompts, RESPONSES))
    single = [values(reward.score([p], [r]))[0] for p, r in zip(tiny_prompts, RESPONSES, strict=True)]
    assert batch == pytest.approx(single, abs=1e-5)
    assert len({round(value, 4) for value in batch}) == len(batch)


def test_answers_to_one_prompt_score_as_alone(reward: Reward, tiny_prompts: Sequence[Prompt]) -> None:
    """Answers to one prompt share its computation; equal answers share all but their last token."""
    prompts = [tiny_prompts[4]] * 6 + [tiny_prompts[0]] * 6 + [tiny_prompts[1]]
    responses = [*RESPONSES, *["same answer"] * 6, "alone"]
    batch = values(reward.score(prompts, responses))
    single = [values(reward.score([p], [r]))[0] for p, r in zip(prompts, responses, strict=True)]
    assert batch == pytest.approx(single, abs=1e-5)


def test_prompt_is_computed_once_for_its_answers(
    tiny_reward: LoadedModel, tiny_prompts: Sequence[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    forward = LlamaModel.forward

    def counted(self: LlamaModel, *args: object, **kwargs: torch.Tensor) -> object:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    ids, n_prompt = encode_answer(tiny_reward.tokenizer, tiny_prompts[0].messages, "a", "chat")
    ClassifierReward(tiny_reward).score([tiny_prompts[0]] * 5, list("abcde"))
    assert shapes == [(1, n_prompt), (5, len(ids) - n_prompt)]


def test_session_scores_partial_text_as_if_it_were_finished(reward: Reward, tiny_prompts: Sequence[Prompt]) -> None:
    prompt = tiny_prompts[0]
    session = reward.start([prompt] * 3)
    session.extend([0, 2], [[10], [11]], ["fi", "si"])
    assert values(session.scores([2, 0])) == pytest.approx(values(reward.score([prompt] * 2, ["si", "fi"])), abs=1e-5)
    session.extend([2], [[12]], ["six"])
    session.keep([2])
    assert values(session.scores([2])) == pytest.approx(values(reward.score([prompt], ["six"])), abs=1e-5)


@pytest.mark.parametrize("max_pass_tokens", [4096, 20])
def test_sessions_follow_growing_rewritten_and_leaving_answers(
    reward: Reward, tiny_prompts: Sequence[Prompt], max_pass_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores equal those from scratch at every cut, whatever was stored: other lengths, other beginnings, holes."""
    monkeypatch.setattr(incremental, "MAX_PASS_TOKENS", max_pass_tokens)
    prompt, rng = tiny_prompts[1], random.Random(0)
    session = reward.start([prompt] * 7)
    texts = {number: "".join(rng.choices("abc 12=", k=number + 1)) for number in range(7)}
    for leaving in ([1], [], [0, 5, 6], [2]):
        numbers = sorted(texts, key=lambda _: rng.random())
        session.extend(numbers, [[1]] * len(numbers), [texts[number] for number in numbers])
        scratch = values(reward.score([prompt] * len(numbers), [texts[number] for number in numbers]))
        assert values(session.scores(numbers)) == pytest.approx(scratch, abs=1e-5, rel=1e-5)
        texts = {number: text for number, text in texts.items() if number not in leaving}
        session.keep(list(texts))
        for number, text in texts.items():
            kept = text if number != 3 else text[: len(text) // 2]  # a rewritten answer
            texts[number] = kept + "".join(rng.choices("xyz 34+", k=rng.randint(0, 9)))


def test_a_cut_costs_the_new_tokens_only(
    tiny_reward: LoadedModel, tiny_prompts: Sequence[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    forward = LlamaModel.forward

    def counted(self: LlamaModel, *args: object, **kwargs: torch.Tensor) -> object:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    prompt = tiny_prompts[0]
    ids, n_prompt = encode_answer(tiny_reward.tokenizer, prompt.messages, "", "chat")
    n_closing = len(ids) - n_prompt
    session = ClassifierReward(tiny_reward).start([prompt] * 2)
    for text in ("abcd", "abcdefg"):
        session.extend([0, 1], [[1], [1]], [text, text.upper()])
        session.scores([0, 1])
    assert shapes == [(1, n_prompt), (2, 4 + n_closing), (2, 3 + n_closing)]


def test_a_broken_answer_does_not_stop_the_session(reward: Reward, tiny_prompts: Sequence[Prompt]) -> None:
    prompt = tiny_prompts[0]
    session = reward.start([prompt] * 2)
    session.extend([0, 1], [[1], [1]], ["fine", "x" * 600])
    fine, broken = session.scores([0, 1])
    assert fine.value is not None and broken.error is not None and "exceed" in broken.error


def test_classifier_equals_transformers(tiny_reward: LoadedModel, tiny_prompts: Sequence[Prompt]) -> None:
    prompt = tiny_prompts[1]
    ids, _ = encode_answer(tiny_reward.tokenizer, prompt.messages, "5", "chat")
    with torch.no_grad():
        expected = tiny_reward.model(torch.tensor([ids])).logits.item()
    assert values(ClassifierReward(tiny_reward).score([prompt], ["5"])) == pytest.approx([expected], abs=1e-6)


def test_classifier_reads_the_last_real_token_even_when_pad_is_the_end_token(
    tiny_reward_dir: Path, tiny_prompts: Sequence[Prompt]
) -> None:
    plain = load_classifier(str(tiny_reward_dir))
    same = load_classifier(str(tiny_reward_dir))
    same.model.config.pad_token_id = same.model.config.eos_token_id
    expected = values(ClassifierReward(plain).score(tiny_prompts, RESPONSES))
    assert values(ClassifierReward(same).score(tiny_prompts, RESPONSES)) == expected


def test_encoder_classifier_works(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], tiny_prompts: Sequence[Prompt]
) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=261, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
    )
    loaded = LoadedModel(BertForSequenceClassification(config).eval(), make_tokenizer(), "bert", "")
    batch = values(ClassifierReward(loaded).score(tiny_prompts, RESPONSES))
    single = [values(ClassifierReward(loaded).score([p], [r]))[0] for p, r in zip(tiny_prompts, RESPONSES, strict=True)]
    assert batch == pytest.approx(single, abs=1e-5)


def test_likelihood_is_the_mean_log_probability(tiny_policy: LoadedModel, tiny_prompts: Sequence[Prompt]) -> None:
    prompt = tiny_prompts[2]
    ids, n_prompt = encode_answer(tiny_policy.tokenizer, prompt.messages, "15.", "chat")
    with torch.no_grad():
        logps = tiny_policy.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = sum(logps[place - 1, ids[place]].item() for place in range(n_prompt, len(ids))) / (len(ids) - n_prompt)
    assert values(LikelihoodReward(tiny_policy).score([prompt], ["15."])) == pytest.approx([expected], abs=1e-5)


def test_a_combination_is_the_weighted_sum(
    tiny_policy: LoadedModel, tiny_reward: LoadedModel, tiny_prompts: Sequence[Prompt]
) -> None:
    first, second = ClassifierReward(tiny_reward), LikelihoodReward(tiny_policy)
    mean, total = (LikelihoodReward(tiny_policy, reduction=how) for how in ("mean", "sum"))
    combined = CombinedReward([(2.0, first), (-3.0, second)]).score(tiny_prompts, RESPONSES)
    a, b = values(first.score(tiny_prompts, RESPONSES)), values(second.score(tiny_prompts, RESPONSES))
    assert values(combined) == pytest.approx([2 * x - 3 * y for x, y in zip(a, b, strict=True)])
    assert combined[0].error is None and CombinedReward([(1.0, first)]).kv_bytes_per_token == first.kv_bytes_per_token
    for prompt, response in zip(tiny_prompts, RESPONSES, strict=True):
        ids, n_prompt = encode_answer(tiny_policy.tokenizer, prompt.messages, response, "chat")
        one, whole = (values(reward.score([prompt], [response]))[0] for reward in (mean, total))
        assert whole == pytest.approx(one * (len(ids) - n_prompt), rel=1e-4)


def test_a_part_without_a_score_leaves_no_sum(tiny_reward: LoadedModel, tiny_prompts: Sequence[Prompt]) -> None:
    def fails(prompt: Prompt, response: str) -> float:
        raise ValueError("no")

    combined = CombinedReward([(1.0, ClassifierReward(tiny_reward)), (1.0, FunctionReward(fails, "fails"))])
    (score,) = combined.score(tiny_prompts[:1], ["a"])
    assert score.value is None and score.error is not None and "fails failed" in score.error


def test_too_long_answer_is_an_error_with_the_numbers(reward: Reward, tiny_prompts: Sequence[Prompt]) -> None:
    short, long = reward.score(tiny_prompts[:2], ["5", "5" * 300])
    assert short.error is None
    assert long.value is None and long.error is not None and "context of 256" in long.error


def test_nan_from_the_model_is_an_error(tiny_reward_dir: Path, tiny_prompts: Sequence[Prompt]) -> None:
    loaded = load_classifier(str(tiny_reward_dir))
    assert isinstance(loaded.model, LlamaForSequenceClassification)
    with torch.no_grad():
        loaded.model.score.weight.fill_(math.nan)
    assert ClassifierReward(loaded).score(tiny_prompts[:1], ["5"]) == [
        Score(None, "reward is nan, not a finite number")
    ]


def test_function_reward_isolates_failures(tiny_prompts: Sequence[Prompt]) -> None:
    def equals_reference(prompt: Prompt, response: str) -> float:
        return {"5": 1.0, "": math.inf}.get(response) or 1 / (len(response) - 2)

    scores = FunctionReward(equals_reference, "rule").score(tiny_prompts[:3], ["5", "", "no"])
    assert scores[0] == Score(1.0)
    assert scores[1].error == "reward is inf, not a finite number"
    assert scores[2].error == "rule failed: ZeroDivisionError: division by zero"


def test_two_labels_are_refused(tiny_reward: LoadedModel, tiny_policy: LoadedModel) -> None:
    with pytest.raises(ModelError, match="2 labels"):
        ClassifierReward(replace(tiny_reward, model=tiny_policy.model))


def test_text_format_scores_raw_text(tiny_reward: LoadedModel) -> None:
    prompt = Prompt("t", (Message("user", "once upon"),), "g")
    assert len(values(ClassifierReward(tiny_reward, "text").score([prompt] * 2, [" a time", " nine"]))) == 2
