"""Tiny random models and prompts shared by the whole test tree. No network, one torch thread."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["WINNOW_FUNCTIONS"] = "tests.tasks.*"
# Ray asks for the token in the home folder, if one is there when a cluster starts, of clients that began without it.
os.environ["RAY_AUTH_MODE"] = "disabled"

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from xdist.scheduler import LoadFileScheduling

from runtime.models import LoadedModel, load_classifier, load_policy
from runtime.records import Message, Prompt

torch.set_num_threads(1)
# No test is about time, and what runs unattended must give the same verdict twice.
settings.register_profile("winnow", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("winnow")


class _ByFile(LoadFileScheduling):
    """Processes share the tests file by file; those of servers and workers stay together, one after the other."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/infra" if nodeid.startswith("tests/infra/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> _ByFile:
    """xdist's own groups are ignored under this pytest."""
    return _ByFile(config, log)


PAD, END = "<pad>", "<end>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, an end token, a pad token and one token per role (261 in all)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([PAD, END, *ROLES, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, END, *ROLES])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
    fast.chat_template = chat_template
    return fast


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Four layers of width 32, four heads that share two key-value heads."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="session")
def tiny_policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama policy; its answers end after some tens of tokens."""
    folder = tmp_path_factory.mktemp("models") / "policy"
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(tokenizer))
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 3  # finished answers must be common
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_reward_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama sequence classifier with one label."""
    folder = tmp_path_factory.mktemp("models") / "reward"
    tokenizer = byte_tokenizer()
    config = tiny_config(tokenizer)
    config.num_labels = 1
    torch.manual_seed(1)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_prompts() -> tuple[Prompt, ...]:
    """Prompts of different length in three groups, with references."""
    texts = (
        "2 + 3 =",
        "What is 12 - 7?",
        "7 plus 8, step by step please.",
        "1 + 1",
        "40 - 2 - 3 is what number?",
        "9",
    )
    answers = ("5", "5", "15", "2", "35", "9")
    groups = ("child", "clerk", "auditor")
    return tuple(
        Prompt(f"prompt-{i}", (Message("user", text),), groups[i % 3], answers[i]) for i, text in enumerate(texts)
    )


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`byte_tokenizer`, for tests that need one without a chat template."""
    return byte_tokenizer


@pytest.fixture(scope="session")
def tiny_policy(tiny_policy_dir: Path) -> LoadedModel:
    """The tiny policy, loaded."""
    return load_policy(str(tiny_policy_dir))


@pytest.fixture(scope="session")
def tiny_reward(tiny_reward_dir: Path) -> LoadedModel:
    """The tiny reward model, loaded."""
    return load_classifier(str(tiny_reward_dir))


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of public models next to the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "models"
    if not folder.is_dir():
        pytest.skip("needs ../shared/models, which is absent")
    return folder
