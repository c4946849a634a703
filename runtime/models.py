"""Loading models and tokenizers, and the one way in which text becomes token ids."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from runtime.errors import InputError, ModelError, TemplateError
from runtime.model_files import content_hash, first_line, model_folder
from runtime.records import Message

PromptFormat = Literal["chat", "text"]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer, where it came from and the hash of its files."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    content_hash: str


def load_policy(source: str, dtype: str = "float32", device: str = "cpu") -> LoadedModel:
    """Load a causal language model from a local folder or by hub name; safetensors only, no remote code."""
    return _load(source, dtype, device, AutoModelForCausalLM)


def load_classifier(source: str, dtype: str = "float32", device: str = "cpu") -> LoadedModel:
    """Load a sequence classifier with exactly one label, used as a reward model."""
    folder = model_folder(source)
    try:
        n_labels = int(AutoConfig.from_pretrained(folder, trust_remote_code=False).num_labels)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read the config of {source!r}: {first_line(error)}") from error
    if n_labels != 1:
        raise ModelError(f"{source!r} has {n_labels} labels; a reward model needs num_labels = 1 (one score per text)")
    return _load(source, dtype, device, AutoModelForSequenceClassification)


def load_reward_start(source: str, device: str = "cpu", seed: int = 0) -> LoadedModel:
    """What a reward model is trained from: a classifier with one label as it is, or a policy with a new head."""
    try:
        architectures = AutoConfig.from_pretrained(model_folder(source), trust_remote_code=False).architectures or [""]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read the config of {source!r}: {first_line(error)}") from error
    if architectures[0].endswith("ForSequenceClassification"):
        return load_classifier(source, "float32", device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _load(source, "float32", device, AutoModelForSequenceClassification, {"num_labels": 1})


def load_policy_4bit(source: str) -> LoadedModel:
    """A causal language model on the GPU with its linear layers in 4 bit (QLoRA, arXiv 2305.14314)."""
    from transformers import BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return _load(
        source, "bfloat16", "cuda", AutoModelForCausalLM, {"quantization_config": four_bit, "device_map": {"": 0}}
    )


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or hub name, for a model that is served elsewhere."""
    return _tokenizer(model_folder(source), source)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], format: PromptFormat) -> list[int]:
    """Token ids after which the answer starts.

    `chat` applies the chat template with the generation prompt. `text` encodes the content of exactly one
    message with the tokenizer's own special tokens, but never a closing end token.
    """
    if format == "chat":
        return _encode_rendered(tokenizer, _render(tokenizer, messages, add_generation_prompt=True))
    if len(messages) != 1:
        raise InputError(f'a prompt of {len(messages)} messages cannot be raw text; set prompt_format = "chat"')
    text = messages[0].content
    token_ids = _encode(tokenizer, text, add_special_tokens=True)
    bare_ids = _encode(tokenizer, text, add_special_tokens=False)
    has_closing_end = len(token_ids) > 1 and token_ids[-1] == tokenizer.eos_token_id
    return token_ids[:-1] if has_closing_end and bare_ids[-1:] != token_ids[-1:] else token_ids


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], format: PromptFormat) -> str:
    """The text of `encode_prompt`, for a server that tokenizes by itself.

    Servers put the tokenizer's start token in front of a text, so one that the chat template writes is left out.
    """
    if format == "text":
        if len(messages) != 1:
            raise InputError(f'a prompt of {len(messages)} messages cannot be raw text; set prompt_format = "chat"')
        return messages[0].content
    text = _render(tokenizer, messages, add_generation_prompt=True)
    start = tokenizer.bos_token
    adds_start = start is not None and _encode(tokenizer, "", add_special_tokens=True)[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(str(start)) if adds_start else text


def encode_answer(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    response: str | Sequence[Message],
    format: PromptFormat,
) -> tuple[list[int], int]:
    """Token ids of the whole conversation with its closing tokens, and how many of them are the prompt.

    A response is a text, or messages where a tool or the user speaks in between. The prompt ids (`encode_prompt`) are
    always a prefix: where the tokenizer would merge characters across the border, prompt and answer are encoded apart,
    as they are when the answer is sampled.
    """
    prompt_ids = encode_prompt(tokenizer, messages, format)
    answer = [Message("assistant", response)] if isinstance(response, str) else response
    if format == "text":
        if len(answer) != 1:
            raise InputError(f'an answer of {len(answer)} messages cannot be raw text; set prompt_format = "chat"')
        answer_ids = _encode(tokenizer, answer[0].content, add_special_tokens=False)
        end = tokenizer.eos_token_id
        return prompt_ids + answer_ids + ([int(cast(int, end))] if end is not None else []), len(prompt_ids)
    prompt_text = _render(tokenizer, messages, add_generation_prompt=True)
    text = _render(tokenizer, [*messages, *answer], add_generation_prompt=False)
    token_ids = _encode_rendered(tokenizer, text)
    if token_ids[: len(prompt_ids)] == prompt_ids:
        return token_ids, len(prompt_ids)
    if not text.startswith(prompt_text):
        raise TemplateError(
            "the chat template renders the prompt differently once it is answered; "
            'use a template whose generation prompt is a prefix, or set prompt_format = "text"'
        )
    return prompt_ids + _encode_rendered(tokenizer, text[len(prompt_text) :]), len(prompt_ids)


def stop_ids(loaded: LoadedModel) -> frozenset[int]:
    """Every end-of-sequence id of the generation config, the model config and the tokenizer."""
    sources = (
        getattr(loaded.model.generation_config, "eos_token_id", None),
        getattr(loaded.model.config, "eos_token_id", None),
        loaded.tokenizer.eos_token_id,
    )
    found: set[int] = set()
    for value in sources:
        if value is not None:
            found.update(int(item) for item in (value if isinstance(value, list | tuple) else [value]))
    return frozenset(found)


def _load(
    source: str,
    dtype: str,
    device: str,
    model_class: type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification],
    extra: Mapping[str, object] | None = None,
) -> LoadedModel:
    if dtype not in _DTYPES:
        raise ModelError(f"dtype {dtype!r} is not supported; use one of {', '.join(_DTYPES)}")
    folder = model_folder(source)
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{source!r} has no *.safetensors file; save the model with save_pretrained")
    try:
        with quiet():
            found = model_class.from_pretrained(
                folder,
                dtype=_DTYPES[dtype],
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **(extra or {}),
            )
            model, info = cast(tuple[PreTrainedModel, dict[str, Iterable[str]]], found)
        if "device_map" not in (extra or {}):
            cast(torch.nn.Module, model).to(device)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"cannot load {source!r}: {first_line(error)}") from error
    # A head that is asked for may be new.
    missing = sorted(name for name in info["missing_keys"] if "num_labels" not in (extra or {}) or "score" not in name)
    if missing:
        names = ", ".join(missing[:3])
        raise ModelError(
            f"{source!r} lacks weights of {type(model).__name__} ({names}); is it the right kind of model?"
        )
    # from_pretrained leaves the model in evaluation mode.
    return LoadedModel(model, _tokenizer(folder, source), source, content_hash(source))


def _tokenizer(folder: Path, source: str) -> PreTrainedTokenizerBase:
    try:
        with quiet():
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # its files may come from anywhere, and the library raises what it likes about them
        reason = f"{type(error).__name__}: {first_line(error)}"[:200]
        raise ModelError(
            f"cannot load the tokenizer of {source!r}: {reason}; give a folder written by save_pretrained"
        ) from error
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and loading reports: what matters in them becomes a ModelError."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    if not tokenizer.chat_template:
        raise ModelError('the tokenizer has no chat template; set prompt_format = "text" or use a chat model')
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # templates are programs: what they raise about these messages concerns this row
        raise InputError(f"the chat template refuses the messages: {first_line(error)}") from error
    return cast(str, text)


def _encode_rendered(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The template writes the special tokens itself.
    return _encode(tokenizer, text, add_special_tokens=False)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool) -> list[int]:
    try:
        return cast(list[int], tokenizer.encode(text, add_special_tokens=add_special_tokens))
    except Exception as error:  # of a type that has no other name, where a vocabulary has no token for a text
        raise InputError(f"the tokenizer cannot encode the text: {first_line(error)}") from error
