"""Messages as the lake keeps them: checked, in one Unicode form, and named by their content."""

import hashlib
import json
import unicodedata
from collections.abc import Sequence

ROLES = ("system", "user", "assistant", "tool")
Messages = list[dict[str, str]]


class Unusable(Exception):
    """A row that becomes a rejected row: (reason, detail)."""


def clean_text(text: str) -> str:
    """`text` in Unicode's composed form, with plain line ends and no white space around it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unusable("unreadable", f"text with half a character, {error.object[error.start]!r}") from error
    return unicodedata.normalize("NFC", text).replace("\r\n", "\n").strip()


def clean_turns(raw: Sequence[object]) -> Messages:
    """Messages with known roles and text; Unusable otherwise."""
    messages = []
    for turn in raw:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise Unusable("bad_messages", f"each message needs a role out of {', '.join(ROLES)} and text as content")
        messages.append({"role": turn["role"], "content": clean_text(turn["content"])})
    return messages


def clean_prompt(raw: Sequence[object], system_prompt: str | None) -> Messages:
    """A conversation that waits for an answer; `system_prompt` goes in front where there is none."""
    messages = clean_turns(raw)
    for message in messages:
        if not message["content"]:
            raise Unusable("empty_prompt", f"the {message['role']} message has no text")
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        last = f"the last message is the {messages[-1]['role']}'s" if messages else "there is no message"
        raise Unusable("bad_messages", f"{last}; it must be the user's")
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def prompt_id_of(messages: Messages) -> str:
    """32 hexadecimal digits of the sha256 over the normalised messages."""
    text = json.dumps(messages, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
