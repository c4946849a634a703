"""The starter's true rule: the right final number, in the style that the group wants."""

from __future__ import annotations

import re

from runtime.errors import InputError
from runtime.records import Prompt
from runtime.starter.problems import GROUPS, Group

_NUMBER = r"-?\d+"
_EQUATION = rf"{_NUMBER} [+-] {_NUMBER} = {_NUMBER}"
_STYLES: dict[str, re.Pattern[str]] = {
    "child": re.compile(
        rf"Start with {_NUMBER}\.\n"
        rf"(?:(?:Add|Take away) {_NUMBER} and you have {_NUMBER}\.\n)+"
        rf"So the answer is (?P<answer>{_NUMBER})\."
    ),
    "clerk": re.compile(rf"Sum {_EQUATION}(?:; {_EQUATION})*; result (?P<answer>{_NUMBER})\."),
    "auditor": re.compile(
        rf"(?:Step {_EQUATION}\.\n)+Total (?P<answer>{_NUMBER})\.\nCheck {_EQUATION}(?:; {_EQUATION})*\."
    ),
}


def style_of(response: str) -> Group | None:
    """The style an answer is written in, or None when it fits none."""
    return next((group for group in GROUPS if _STYLES[group].fullmatch(response)), None)


def final_number(response: str) -> int | None:
    """The number an answer ends on, or None when it fits no style."""
    for pattern in _STYLES.values():
        match = pattern.fullmatch(response)
        if match:
            return int(match["answer"])
    return None


def truth(prompt: Prompt, response: str) -> float:
    """1.0 when the number is the prompt's reference and the style is its group's, else 0.0.

    Raises InputError for a prompt without a reference or with a group the starter does not know.
    """
    if prompt.group not in _STYLES:
        raise InputError(f'group "{prompt.group}" is unknown to the starter rule; use one of {", ".join(_STYLES)}')
    if prompt.reference is None:
        raise InputError(f"prompt {prompt.prompt_id} has no reference answer, which the starter rule needs")
    match = _STYLES[prompt.group].fullmatch(response.strip())
    return 1.0 if match and match["answer"] == prompt.reference.strip() else 0.0
