"""Reading raw prompt rows: JSONL, Parquet, CSV, a `datasets` folder or hub name, the starter's own prompts.

A reader yields (row number from 1, row) or (row number, Unreadable); a source that cannot be read at all is an
InputError.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from storage.shards import read_parquet
from tasks.errors import InputError
from tasks.settings import STARTER, IngestConfig
from tasks.versions import digest_file

ENDINGS = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row that cannot be read, and why."""

    detail: str


RawRow = tuple[int, dict[str, object] | Unreadable]


def source_identity(config: IngestConfig) -> str:
    """What the source adds to the fingerprint: the hash of its bytes, or the revision of a hub dataset."""
    if config.source == STARTER or source_format(config) != "dataset":
        return digest_file(_read_bytes(_file_of(config)))
    folder = Path(config.source)
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return digest_file(b"".join(f"{p.relative_to(folder)} {digest_file(p.read_bytes())}\n".encode() for p in files))
    return _hub_revision(config.source)


def source_format(config: IngestConfig) -> str:
    """The configured format, or the one that the source's name says."""
    if config.source == STARTER:
        return "jsonl"
    if config.format != "auto":
        return config.format
    ending = Path(config.source).suffix.lower()
    if ending in ENDINGS:
        return ENDINGS[ending]
    if ending and Path(config.source).is_file():
        raise InputError(
            f'source "{config.source}": unknown ending "{ending}"; set format = "jsonl", "parquet" or "csv"'
        )
    return "dataset"


def read_rows(config: IngestConfig) -> Iterator[RawRow]:
    """All rows of the source."""
    kind = source_format(config)
    if kind == "dataset":
        return _read_dataset(config)
    path = _file_of(config)
    data = _read_bytes(path)
    if kind == "parquet":
        return _read_parquet(data, path)
    return _read_jsonl(data, path) if kind == "jsonl" else _read_csv(data, path)


def _file_of(config: IngestConfig) -> Path:
    if config.source == STARTER:
        from runtime.starter import prompts_path

        return prompts_path()
    return Path(config.source)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f'source "{path}" does not exist; give a file, a folder, a hub name or "starter"') from error
    except OSError as error:
        raise InputError(f'source "{path}" cannot be read: {error.strerror}') from error


def _read_jsonl(data: bytes, path: Path) -> Iterator[RawRow]:
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            yield number, Unreadable(f"not JSON: {error}")
            continue
        yield number, row if isinstance(row, dict) else Unreadable("not a JSON object")


def _read_csv(data: bytes, path: Path) -> Iterator[RawRow]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f'source "{path}" is not UTF-8 text ({error.reason} at byte {error.start}); convert it'
        ) from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for number, row in enumerate(reader, start=1):
        if None in row or None in row.values():
            yield number, Unreadable("the number of cells differs from the header")
        else:
            yield number, dict(row)


def _read_parquet(data: bytes, path: Path) -> Iterator[RawRow]:
    import pyarrow as pa

    try:
        rows = read_parquet(data).to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f'source "{path}" is not a readable Parquet file: {reason}') from error
    yield from enumerate(rows, start=1)


def _read_dataset(config: IngestConfig) -> Iterator[RawRow]:
    import datasets

    try:
        rows = datasets.load_dataset(config.source, split=config.dataset_split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f'source "{config.source}" is neither a file nor a loadable dataset: {reason}') from error
    yield from enumerate((dict(row) for row in rows), start=1)


def _hub_revision(name: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return f"hub:{HfApi().dataset_info(name, timeout=10).sha}"
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(
            f'source "{name}" is no file or folder, and no reachable hub dataset either; check it'
        ) from error
