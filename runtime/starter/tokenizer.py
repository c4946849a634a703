"""The starter's tokenizer: a byte-fallback BPE in which every word and every number of the problems is one token."""

from __future__ import annotations

import json
import random
from typing import cast

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from runtime.starter.problems import AUDIENCES, GROUPS, MAX_TOTAL, draw_question, write_answer

SPECIAL_TOKENS = ("<unk>", "<s>", "<|end|>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role'] + '; use system, user or assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCABULARY_SIZE = 640  # words and numbers only; special tokens and bytes come on top
CORPUS_QUESTIONS = 4000


def build_tokenizer(seed: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer on text drawn from the seed; `max_length` is the model's context in tokens."""
    learned, merges = _learn_merges(seed)
    pieces = list(SPECIAL_TOKENS) + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [piece for piece in learned if piece not in pieces]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    # Words and signs keep their leading space; stops and line ends stand alone, so no merge crosses them.
    space = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="never")
    stops = pre_tokenizers.Split(Regex("[\n.,;:?!]"), behavior="isolated")
    return pre_tokenizers.Sequence([space, stops])


def _learn_merges(seed: int) -> tuple[list[str], list[tuple[str, str]]]:
    """(pieces in order of learning, merges)."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY_SIZE, min_frequency=2, show_progress=False)
    learner.train_from_iterator(_corpus(seed), trainer)
    model = json.loads(learner.to_str())["model"]
    pieces = sorted(model["vocab"], key=lambda piece: cast(int, model["vocab"][piece]))
    return pieces, [(left, right) for left, right in model["merges"]]


def _corpus(seed: int) -> list[str]:
    """Questions, answers of every style and every number; line ends are left to the byte fallback."""
    rng = random.Random(seed)
    texts = [f" {number}" for number in range(MAX_TOTAL + 1)] * 50
    texts += [text for wordings in AUDIENCES.values() for text in wordings] * 50
    for _ in range(CORPUS_QUESTIONS):
        question = draw_question(rng, held_out=False)
        texts.append(question.text)
        for style in GROUPS:
            texts += write_answer(question.problem, style, question.problem.totals).split("\n")
    return texts
