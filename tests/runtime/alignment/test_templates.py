"""Chat templates as published models have them: the prompt is a prefix, and what the assistant says is the answer."""

import pytest
from transformers import PreTrainedTokenizerFast

from runtime.alignment.collate import EncodedPair, PreferenceRow, encode_pairs
from runtime.alignment.encode import answer_spans
from runtime.models import encode_prompt
from runtime.records import Message
from tests.conftest import byte_tokenizer

QWEN2 = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    "<|im_end|>\\n' }}{%- endif %}{%- for message in messages %}{%- if (message.role == 'user') or "
    "(message.role == 'system' and not loop.first) or (message.role == 'assistant') %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- elif message.role == 'tool' %}{%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != 'tool') %}"
    "{{- '<|im_start|>user' }}{%- endif %}{{- '\\n<tool_response>\\n' }}{{- message.content }}"
    "{{- '\\n</tool_response>' }}{%- if loop.last or (messages[loop.index0 + 1].role != 'tool') %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Of earlier turns the thoughts are left out, of the last one they are shown, empty ones too.
QWEN3 = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{%- endif %}{%- set ns = namespace(last_query_index=0) %}{%- for message in messages %}"
    "{%- if message.role == 'user' %}{%- set ns.last_query_index = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- if (message.role == 'user') or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- elif message.role == 'assistant' %}{%- if loop.index0 > ns.last_query_index and loop.last %}"
    "{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + message.content }}{%- else %}"
    "{{- '<|im_start|>assistant\\n' + message.content }}{%- endif %}{{- '<|im_end|>\\n' }}"
    "{%- elif message.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + message.content "
    "+ '\\n</tool_response><|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{%- set role = 'ipython' if message.role == 'tool' else message.role %}"
    "{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "qwen2": (QWEN2, "<|im_end|>", ("<|im_start|>",)),
    "qwen3": (QWEN3, "<|im_end|>", ("<|im_start|>",)),
    "llama3": (LLAMA3, "<|eot_id|>", ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>")),
    "mistral": (MISTRAL, "</s>", ("<s>",)),
}
USER, SYSTEM = Message("user", "2 + 2?"), Message("system", "Be brief.")
CALLED = (Message("assistant", "calc(2+2)"), Message("tool", "4"))


def _tokenizer(name: str) -> PreTrainedTokenizerFast:
    template, end, others = TEMPLATES[name]
    tokenizer = byte_tokenizer(template)
    starts = {"bos_token": others[0]} if name in ("llama3", "mistral") else {}
    tokenizer.add_special_tokens({"eos_token": end, "additional_special_tokens": list(others), **starts})
    return tokenizer


def _encoded(
    name: str, prompt: tuple[Message, ...], chosen: str | tuple[Message, ...] = "four"
) -> tuple[list[EncodedPair], dict[str, int]]:
    pairs, dropped = encode_pairs([PreferenceRow("p", "g", prompt, chosen, "five")], _tokenizer(name), "chat", 600)
    return pairs, dict(dropped)


def _said(name: str, pair: EncodedPair) -> list[str]:
    spans = answer_spans(pair, pair.chosen, pair.chosen_spans)
    return [_tokenizer(name).decode(pair.chosen[start:end]) for start, end in spans]


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_the_prompt_is_a_prefix_and_the_answer_ends_with_the_templates_end_token(name: str) -> None:
    for prompt in ((USER,), (USER, Message("assistant", "4"), Message("user", "sure?"))):
        (pair,), dropped = _encoded(name, prompt)
        assert dropped == {}
        assert pair.chosen[: pair.n_prompt] == pair.rejected[: pair.n_prompt]
        assert pair.chosen[: pair.n_prompt] == encode_prompt(_tokenizer(name), prompt, "chat")
        thoughts = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
        assert _said(name, pair) == [f"{thoughts}four{TEMPLATES[name][1]}"]


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama3"])
def test_system_and_tool_messages_are_part_of_the_prompt(name: str) -> None:
    (pair,), dropped = _encoded(name, (SYSTEM, USER, *CALLED))
    assert dropped == {}
    shown = _tokenizer(name).decode(pair.chosen[: pair.n_prompt])
    assert "Be brief." in shown and "calc(2+2)" in shown and shown.count("4") == 1
    assert _said(name, pair)[0].endswith(f"four{TEMPLATES[name][1]}")


@pytest.mark.parametrize("name", ["qwen2", "llama3"])
def test_of_an_answer_with_a_tool_call_both_turns_of_the_assistant_are_trained_on(name: str) -> None:
    (pair,), dropped = _encoded(name, (USER,), (*CALLED, Message("assistant", "four")))
    assert dropped == {}
    end = TEMPLATES[name][1]
    assert _said(name, pair) == [f"calc(2+2){end}", f"four{end}"]


def test_a_template_that_shows_earlier_turns_differently_has_such_answers_dropped() -> None:
    prompt, answer = (USER,), (*CALLED, Message("assistant", "four"))
    rows = [PreferenceRow("p", "g", prompt, chosen, "five") for chosen in (answer, "four")]
    pairs, dropped = encode_pairs(rows, _tokenizer("qwen3"), "chat", 600)
    assert len(pairs) == 1 and dropped == {"prompt_not_a_prefix": 1}


def test_what_a_template_refuses_is_counted() -> None:
    assert _encoded("mistral", (SYSTEM, USER)) == ([], {"refused": 1})
    assert _encoded("mistral", (USER, *CALLED)) == ([], {"refused": 1})
