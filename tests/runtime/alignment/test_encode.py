"""From conversations to token ids: what counts as the answer, what is dropped, what is cut, and that all is counted."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from runtime.alignment.collate import EncodedPair, PreferenceRow, collate, encode_pairs
from runtime.alignment.encode import Truncation, cut_counts
from runtime.errors import InputError, ModelError
from runtime.models import LoadedModel, encode_prompt
from runtime.records import Message
from tests.conftest import byte_tokenizer

USER = Message("user", "2 + 2?")
ROW = PreferenceRow("p", "g", (USER,), "four", "five")
TOKENIZER = byte_tokenizer()


def _answers(pair: EncodedPair, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> list[str]:
    """What is trained on, per side; a gap between spans is shown as a bar."""
    batch = collate([pair], 0, with_rejected=True)
    shown = []
    for ids, flags in zip(batch.token_ids.tolist(), batch.is_answer.tolist(), strict=True):
        parts = [tokenizer.decode([token]) if flag else "|" for token, flag in zip(ids, flags, strict=True)]
        text = "".join(parts).strip("|")
        while "||" in text:
            text = text.replace("||", "|")
        shown.append(text)
    return shown


def _one(row: PreferenceRow, tokenizer: PreTrainedTokenizerFast = TOKENIZER, max_length: int = 200) -> EncodedPair:
    (pair,), dropped = encode_pairs([row], tokenizer, "chat", max_length)
    assert not dropped
    return pair


def test_system_turns_and_tool_messages_of_the_prompt_go_through_the_template() -> None:
    prompt = (
        Message("system", "Be brief."),
        USER,
        Message("assistant", "calc(2+2)"),
        Message("tool", "4"),
    )
    pair = _one(replace(ROW, messages=prompt))
    assert pair.chosen[: pair.n_prompt] == encode_prompt(TOKENIZER, prompt, "chat")
    assert TOKENIZER.decode(pair.chosen) == (
        "<|system|>Be brief.<end><|user|>2 + 2?<end><|assistant|>calc(2+2)<end><|tool|>4<end><|assistant|>four<end>"
    )
    assert _answers(pair) == ["four<end>", "five<end>"]


def test_of_an_answer_of_several_messages_only_what_the_assistant_says_is_trained_on() -> None:
    long = (
        Message("assistant", "calc(2+2)"),
        Message("tool", "4"),
        Message("user", "so?"),
        Message("assistant", "four"),
    )
    pair = _one(replace(ROW, chosen=long))
    assert _answers(pair) == ["calc(2+2)<end>|four<end>", "five<end>"]
    assert pair.n_answer == (len("calc(2+2)") + 1 + len("four") + 1, len("five") + 1)


@pytest.mark.parametrize("roles", [("assistant", "tool"), ("assistant", "user"), ("tool", "assistant")])
def test_an_answer_that_starts_or_ends_with_somebody_else_is_refused(roles: tuple[str, ...]) -> None:
    row = replace(ROW, chosen=tuple(Message(role, "4") for role in roles))
    assert encode_pairs([row], TOKENIZER, "chat", 200) == ([], {"refused": 1})


def test_messages_as_raw_text_are_refused() -> None:
    row = replace(ROW, chosen=(Message("assistant", "a"), Message("user", "b"), Message("assistant", "c")))
    assert encode_pairs([row], TOKENIZER, "text", 200)[1] == {"refused": 1}


def test_template_text_behind_the_end_token_is_no_part_of_the_answer() -> None:
    tokenizer = byte_tokenizer(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert _answers(_one(ROW, tokenizer), tokenizer) == ["four<end>", "five<end>"]
    turns = (Message("assistant", "2?"), Message("user", "2!"), Message("assistant", "four"))
    assert _answers(_one(replace(ROW, chosen=turns), tokenizer), tokenizer)[0] == "2?<end>|four<end>"


def test_an_answer_that_ends_in_a_line_break_keeps_it() -> None:
    assert _answers(_one(replace(ROW, chosen="four\n\n")))[0] == "four\n\n<end>"


def test_a_template_that_ends_no_turn_gets_the_end_token_of_the_tokenizer() -> None:
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert _answers(_one(ROW, tokenizer), tokenizer) == ["four\n<end>", "five\n<end>"]


def test_a_turn_may_end_with_another_special_token_than_the_tokenizers_own() -> None:
    tokenizer = byte_tokenizer(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|user|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert _answers(_one(ROW, tokenizer), tokenizer) == ["four<|user|>", "five<|user|>"]


def test_each_unusable_row_has_its_reason() -> None:
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}{% endif %}"
        "<|{{ m.role }}|>{{ m.content | trim }}<end>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    rows = [
        ROW,
        replace(ROW, chosen=""),
        replace(ROW, rejected=" \n"),
        replace(ROW, chosen=()),
        replace(ROW, rejected="four"),
        replace(ROW, rejected="four "),  # equal once the template has trimmed it
        replace(ROW, chosen="no"),
        replace(ROW, messages=(Message("user", "x" * 70),)),
        replace(ROW, chosen="x" * 70),
    ]
    pairs, dropped = encode_pairs(rows, tokenizer, "chat", 64)
    assert [pair.row for pair in pairs] == [0]
    assert dropped == {"empty_answer": 3, "equal_answers": 2, "refused": 1, "prompt_too_long": 1, "too_long": 1}
    assert len(pairs) + dropped.total() == len(rows)


def test_an_empty_prompt_predicts_nothing() -> None:
    row = replace(ROW, messages=(Message("user", ""),))
    assert encode_pairs([row], TOKENIZER, "text", 64)[1] == {"empty_prompt": 1}


def test_a_template_that_keeps_no_prompt_is_one_clear_line() -> None:
    tokenizer = byte_tokenizer("{{ messages | length }}{{ messages[-1].content }}")
    tokenizer.name_or_path = "models/odd"
    with pytest.raises(InputError, match='chat template of "models/odd" .* \\(all 2 pairs\\)') as caught:
        encode_pairs([ROW, ROW], tokenizer, "chat", 64)
    assert "\n" not in str(caught.value)


def test_rows_whose_prompt_is_rewritten_are_dropped_beside_others() -> None:
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{{ 'late ' if messages[-1].content == 'odd' else '' }}<|{{ m.role }}|>{{ m.content }}"
        "<end>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    pairs, dropped = encode_pairs([ROW, replace(ROW, chosen="odd")], tokenizer, "chat", 64)
    assert (len(pairs), dropped) == (1, {"prompt_not_a_prefix": 1})


def test_a_template_that_rewrites_earlier_turns_of_the_answer_is_seen() -> None:
    tokenizer = byte_tokenizer(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.last or m.role != 'assistant' else 'gone' }}<end>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    turns = (Message("assistant", "2?"), Message("user", "2!"), Message("assistant", "four"))
    pairs, dropped = encode_pairs([ROW, replace(ROW, chosen=turns)], tokenizer, "chat", 64)
    assert (len(pairs), dropped) == (1, {"prompt_not_a_prefix": 1})


def test_a_tokenizer_without_template_names_the_fix(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    with pytest.raises(ModelError, match='set prompt_format = "text"'):
        encode_pairs([ROW], make_tokenizer(None), "chat", 64)


def test_keep_end_cuts_the_same_start_of_both_prompts() -> None:
    whole = _one(ROW)
    (pair,), dropped = encode_pairs([ROW], TOKENIZER, "chat", 9, "keep_end")
    n_cut = whole.length - 9
    assert not dropped
    assert (pair.chosen, pair.rejected) == (whole.chosen[n_cut:], whole.rejected[n_cut:])
    assert pair.n_prompt == whole.n_prompt - n_cut
    assert _answers(pair) == ["four<end>", "five<end>"]
    assert cut_counts([pair]) == {"prompt_cut": 1}


def test_keep_start_cuts_the_ends_of_the_answers() -> None:
    row = replace(ROW, chosen="four, as I said")
    n_prompt = _one(row).n_prompt
    (pair,), dropped = encode_pairs([row], TOKENIZER, "chat", n_prompt + 6, "keep_start")
    assert not dropped
    assert _answers(pair) == ["four, ", "five<end>"]
    assert cut_counts([pair]) == {"answer_cut": 1}


def test_what_cannot_be_cut_is_dropped_with_its_reason() -> None:
    answer = replace(ROW, chosen="x" * 64)
    assert encode_pairs([answer], TOKENIZER, "chat", 64, "keep_end")[1] == {"answer_too_long": 1}
    alike = replace(ROW, chosen="x" * 64, rejected="x" * 63 + "y")
    assert encode_pairs([alike], TOKENIZER, "chat", 32, "keep_start")[1] == {"equal_after_cut": 1}
    prompt = replace(ROW, messages=(Message("user", "x" * 64),))
    assert encode_pairs([prompt], TOKENIZER, "chat", 64, "keep_start")[1] == {"prompt_too_long": 1}


texts = st.text("ab \n", max_size=12)
turns = st.lists(st.sampled_from(["assistant", "tool", "user"]), max_size=3).map(lambda roles: [*roles, "assistant"])


@given(texts, texts, texts, turns, st.integers(2, 60), st.sampled_from(["drop", "keep_end", "keep_start"]))
def test_every_row_is_a_fitting_pair_or_counted(
    prompt: str, chosen: str, rejected: str, roles: list[str], max_length: int, truncation: Truncation
) -> None:
    said = tuple(Message(role, chosen) for role in roles)
    row = PreferenceRow("p", "g", (Message("user", prompt),), said, rejected)
    pairs, dropped = encode_pairs([row], TOKENIZER, "chat", max_length, truncation)
    assert len(pairs) + dropped.total() == 1
    for pair in pairs:
        batch = collate([pair], 0, with_rejected=True)
        assert batch.token_ids.shape[1] == pair.length <= max_length
        assert tuple(batch.is_answer.sum(-1).tolist()) == pair.n_answer
        assert min(pair.n_answer) > 0
        assert not batch.is_answer[:, 0].any()  # nothing predicts the first token
        assert pair.chosen[: pair.n_prompt] == pair.rejected[: pair.n_prompt]
        assert pair.chosen != pair.rejected


def test_pairs_know_their_row(tiny_policy: LoadedModel) -> None:
    rows = [replace(ROW, prompt_id="a"), replace(ROW, chosen=""), replace(ROW, prompt_id="c")]
    pairs, _ = encode_pairs(rows, tiny_policy.tokenizer, "chat", 64)
    assert [(pair.prompt_id, pair.row) for pair in pairs] == [("a", 0), ("c", 2)]
