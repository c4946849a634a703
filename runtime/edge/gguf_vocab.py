"""A tokenizer as GGUF has it: SentencePiece with bytes (`llama`), or byte-level BPE (`gpt2`)."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from runtime.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
NEWLINE_BYTE, NEWLINE_LETTER = "<0x0A>", "\u010a"
# What clients split text by before merging, told by a part of its expression; they know it by a name.
PRE_TOKENIZERS = {
    r"\p{N}{1,3}": "llama-bpe",
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|": "qwen2",
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """One entry per row of the embeddings. pre: how clients split text (gpt2). add_prefix: a space before the text."""

    model: Literal["llama", "gpt2"]
    tokens: list[str]
    scores: list[float]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    pre: str = "default"
    add_prefix: bool = False
    add_start: bool = False


def vocabulary(tokenizer: PreTrainedTokenizerBase, n_rows: int) -> Vocabulary:
    """Of `n_rows` entries; ModelError for a tokenizer that GGUF clients cannot have."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{type(tokenizer).__name__} has no tokenizer.json, which an export to GGUF reads")
    found = cast(dict[str, Any], json.loads(backend.to_str()))
    model = found["model"]
    if model["type"] != "BPE":
        raise ModelError(f"a {model['type']} vocabulary cannot be exported to GGUF; BPE ones can, or use format = hf")
    by_id = {int(number): token for token, number in model["vocab"].items()}
    added = {int(one["id"]): one for one in found["added_tokens"]}
    by_id |= {number: one["content"] for number, one in added.items()}
    if max(by_id) >= n_rows:
        raise ModelError(f"the tokenizer has token {max(by_id)}, but the model only {n_rows} embeddings; resize them")
    is_bytes = bool(model.get("byte_fallback")) and NEWLINE_BYTE in model["vocab"]
    if not is_bytes and NEWLINE_LETTER not in model["vocab"]:
        raise ModelError(
            f"the vocabulary has no byte tokens ({NEWLINE_BYTE}, or byte-level letters), without which GGUF clients "
            "cannot write every text; train the tokenizer with byte_fallback, or use format = bundle or hf"
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(n_rows)]
    types = [_type(number, token, added, model, is_bytes) for number, token in enumerate(tokens)]
    types = [kind if number in by_id else UNUSED for number, kind in enumerate(types)]
    starts = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    if is_bytes:
        return Vocabulary("llama", tokens, _scores(tokens, merges), types, add_prefix=_prefix(found), add_start=starts)
    return Vocabulary("gpt2", tokens, [0.0] * n_rows, types, merges, _pre(found), add_start=starts)


def _type(number: int, token: str, added: dict[int, Any], model: dict[str, Any], is_bytes: bool) -> int:
    if token == model.get("unk_token"):
        return UNKNOWN
    if number in added:
        return CONTROL if added[number]["special"] else USER_DEFINED
    return BYTE if is_bytes and len(token) == 6 and token.startswith("<0x") and token.endswith(">") else NORMAL


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Clients merge the pair whose result scores best; here that is the one that was learned first."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair.replace(" ", ""), rank)
    return [-float(ranks.get(token, len(merges)) + 1) for token in tokens]


def _prefix(found: dict[str, Any]) -> bool:
    text = json.dumps([found.get("normalizer"), found.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _pre(found: dict[str, Any]) -> str:
    pre_tokenizer = json.dumps(found.get("pre_tokenizer"))
    for part, name in PRE_TOKENIZERS.items():
        if json.dumps(part)[1:-1] in pre_tokenizer:
            return name
    if '"use_regex": true' in pre_tokenizer:
        return "gpt-2"
    raise ModelError(
        "the tokenizer splits text in a way that GGUF clients have no name for (known: gpt-2, llama-bpe, qwen2); "
        "use format = bundle or hf"
    )
