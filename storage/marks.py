"""Marks in a lake: what was done once and is not done again, kept for good beside the versions."""

import hashlib

from storage.lake import Lake

FOLDER = "marks"


class Marks:
    """Those of one purpose; each is a small object that holds its own text."""

    def __init__(self, lake: Lake, purpose: str) -> None:
        self.lake, self.prefix = lake, f"{FOLDER}/{purpose}"
        self.keys = set(lake.store.list(self.prefix))

    def __contains__(self, text: str) -> bool:
        return self._key(text) in self.keys

    def add(self, text: str) -> None:
        """Set a mark; one that is there stays."""
        self.lake.store.create(self._key(text), text.encode())
        self.keys.add(self._key(text))

    def _key(self, text: str) -> str:
        return f"{self.prefix}/{hashlib.sha256(text.encode()).hexdigest()[:32]}"
