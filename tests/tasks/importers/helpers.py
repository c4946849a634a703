"""Sources and settings for the tests of the import."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

from tasks.importers.collect import Collected, collect
from tasks.importers.sources import read_source
from tasks.settings import ImportConfig


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    """A JSONL file; text goes in as it is."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def collected(source: Path, **settings: object) -> Collected:
    """The pairs of a source."""
    config = ImportConfig.model_validate({"source": str(source)} | settings)
    return collect(read_source(config), config)


def reasons(found: Collected) -> list[tuple[object, object]]:
    """(row, reason) of every rejected row."""
    return [(row["row"], row["reason"]) for row in found.rejected]


def user(text: str) -> dict[str, str]:
    """A message of the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """A message of the assistant."""
    return {"role": "assistant", "content": text}
