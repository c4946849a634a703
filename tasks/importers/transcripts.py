"""Transcripts of the form `\\n\\nHuman: ...\\n\\nAssistant: ...`, as in HH-RLHF."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tasks.messages import Messages, Unusable

_MARKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Turn:
    """Who speaks, and every character up to the next marker."""

    speaker: str
    text: str


def parse_transcript(transcript: str) -> list[Turn]:
    """The turns; `render_transcript` gives back the same characters. Unusable for text in front of the first."""
    head, *parts = _MARKER.split(transcript)
    if not parts:
        raise Unusable("no_transcript", r'there is no "\n\nHuman:" in it')
    if head:
        raise Unusable("no_transcript", f"there is text in front of the first turn: {head[:40]!r}")
    return [Turn(speaker, text) for speaker, text in zip(parts[::2], parts[1::2], strict=True)]


def render_transcript(turns: Sequence[Turn]) -> str:
    """The transcript of these turns."""
    return "".join(f"\n\n{turn.speaker}:{turn.text}" for turn in turns)


def split_transcripts(chosen: str, rejected: str) -> tuple[Messages, str, str]:
    """(shared turns as messages, chosen answer, rejected answer).

    Unusable unless the two differ in their last turn alone, and that is the assistant's.
    """
    one, other = parse_transcript(chosen), parse_transcript(rejected)
    if one[:-1] != other[:-1]:
        raise Unusable("no_shared_prompt", "the transcripts differ before their last turns")
    if (one[-1].speaker, other[-1].speaker) != ("Assistant", "Assistant"):
        raise Unusable("no_answer", "the last turn is not the assistant's")
    messages = [{"role": _ROLES[turn.speaker], "content": turn.text} for turn in one[:-1]]
    return messages, one[-1].text, other[-1].text
