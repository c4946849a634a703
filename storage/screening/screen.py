"""All the screens of an assembly, in one pass over the prompts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow.dataset as pads

from storage.screening.contamination import Contamination
from storage.screening.language import language_of
from storage.screening.near_duplicates import near_duplicates


@dataclass(frozen=True, slots=True)
class ScreenRules:
    """What prompts are screened for; the defaults screen nothing.

    near_duplicates: Jaccard similarity from which a prompt repeats an earlier one. languages: ISO codes that may stay.
    """

    near_duplicates: float | None = None
    languages: tuple[str, ...] = ()
    n_words: int = 13


def screen(prompts: pads.Dataset, evaluations: Sequence[pads.Dataset], rules: ScreenRules) -> list[dict[str, str]]:
    """Prompts that may not be used, each once, as {prompt_id, reason, detail}; reasons in the order of ScreenRules.

    A near duplicate is dropped in favour of the prompt with the lowest prompt_id.
    """
    found: dict[str, tuple[str, str]] = {}
    if rules.near_duplicates is not None:
        repeated = near_duplicates(sorted(_texts(prompts)), rules.near_duplicates)
        found = {name: ("near_duplicate", f"repeats prompt {original}") for name, original in repeated.items()}
    if rules.languages:
        for name, text in _texts(prompts):
            language = language_of(text)
            if language not in rules.languages:
                found.setdefault(name, ("language", f"{language} is not among {', '.join(rules.languages)}"))
    if evaluations:
        contamination = Contamination((text for one in evaluations for _, text in _texts(one)), rules.n_words)
        for name, text in _texts(prompts):
            run = contamination.find(text)
            if run is not None:
                found.setdefault(name, ("contaminated", f"an evaluation set has: {run}"))
    return [{"prompt_id": name, "reason": found[name][0], "detail": found[name][1]} for name in sorted(found)]


def _texts(prompts: pads.Dataset) -> Iterator[tuple[str, str]]:
    """(prompt_id, what the user says); the system's and the assistant's turns are often shared."""
    for batch in prompts.to_batches(columns=["prompt_id", "messages"]):
        for row in batch.to_pylist():
            yield row["prompt_id"], "\n".join(_user_turns(row["messages"]))


def _user_turns(messages: Iterable[Mapping[str, str]]) -> Iterator[str]:
    return (message["content"] for message in messages if message["role"] == "user")
