"""Texts that share a run of words with an evaluation set."""

import re
from collections.abc import Iterable, Iterator

_WORD = re.compile(r"\w+")


class Contamination:
    """Knows every run of `n_words` words of the evaluation texts; case and punctuation do not count.

    An evaluation text with fewer words is matched as a whole. Runs of 13 words are the custom since GPT-3
    (arXiv 2005.14165, appendix C).
    """

    def __init__(self, texts: Iterable[str], n_words: int) -> None:
        self.n_words = n_words
        self.runs: set[str] = set()
        self.whole: set[str] = set()
        for text in texts:
            words = _WORD.findall(text.lower())
            if len(words) < n_words:
                self.whole.add(" ".join(words))
            self.runs.update(self._runs_of(words))
        self.whole.discard("")

    def find(self, text: str) -> str | None:
        """The first run that `text` shares with an evaluation text, or None."""
        words = _WORD.findall(text.lower())
        whole = " ".join(words)
        if whole in self.whole:
            return whole
        return next((run for run in self._runs_of(words) if run in self.runs), None)

    def _runs_of(self, words: list[str]) -> Iterator[str]:
        return (" ".join(words[i : i + self.n_words]) for i in range(len(words) - self.n_words + 1))
