"""Reading raw rows: JSONL or JSON, Parquet, CSV (each also .gz), a `datasets` folder or name, the starter's prompts.

A reader yields (row number from 1, row) or (row number, Unreadable); a source that cannot be read at all is an
InputError.
"""

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from storage.objects import open_store
from storage.shards import read_parquet
from tasks.errors import InputError
from tasks.settings import STARTER, SourceConfig
from tasks.versions import digest_file

if TYPE_CHECKING:
    import pyarrow as pa

MAX_UNPACKED_BYTES = 4 << 30
BATCH_ROWS = 1000
ENDINGS = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row that cannot be read, and why."""

    detail: str


RawRow = tuple[int, dict[str, object] | Unreadable]


def source_identity(config: SourceConfig) -> str:
    """What the source adds to the fingerprint: the hash of its bytes, or the revision of a hub dataset."""
    if config.source == STARTER or source_format(config) != "dataset":
        return digest_file(_bytes_of(config))
    folder = Path(config.source)
    if folder.is_dir():
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return digest_file(b"".join(f"{p.relative_to(folder)} {digest_file(p.read_bytes())}\n".encode() for p in files))
    return _hub_revision(config.source)


def source_format(config: SourceConfig) -> str:
    """The configured format, or the one that the source's name says."""
    if config.source == STARTER:
        return "jsonl"
    if config.format != "auto":
        return config.format
    ending = ending_of(Path(config.source))
    if ending in ENDINGS:
        return ENDINGS[ending]
    if Path(config.source).is_file():
        shown = Path(config.source).suffix
        raise InputError(
            f'source "{config.source}": unknown ending "{shown}"; set format = "jsonl", "parquet" or "csv"'
        )
    return "dataset"


def ending_of(path: Path) -> str:
    """The ending that says the format: `.jsonl` of `x.jsonl.gz`."""
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() if ending == ".gz" else ending


def read_rows(config: SourceConfig) -> Iterator[RawRow]:
    """All rows of the source."""
    kind = source_format(config)
    if kind == "dataset":
        return _read_dataset(config)
    path = _file_of(config)
    data = _unpacked(_bytes_of(config), path)
    if kind == "parquet":
        return _read_parquet(data, path)
    if kind == "csv":
        return _read_csv(data, path)
    is_list = ending_of(path) == ".json" and data.lstrip()[:1] == b"["
    return _read_json_list(data, path) if is_list else _read_jsonl(data)


def _file_of(config: SourceConfig) -> Path:
    if config.source == STARTER:
        from runtime.starter import prompts_path

        return prompts_path()
    return Path(config.source)


def _bytes_of(config: SourceConfig) -> bytes:
    if not config.source.startswith("s3://"):
        return _read_bytes(_file_of(config))
    folder, _, name = config.source.rpartition("/")
    (data,) = open_store(folder).read_all([name])
    if data is None:
        raise InputError(f'source "{config.source}" does not exist; give the address of a file')
    return data


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f'source "{path}" does not exist; give a file, a folder, a hub name or "starter"') from error
    except OSError as error:
        raise InputError(f'source "{path}" cannot be read: {error.strerror}') from error


def _unpacked(data: bytes, path: Path) -> bytes:
    """The content of a .gz file; any other as it is."""
    if path.suffix.lower() != ".gz":
        return data
    try:
        with gzip.open(io.BytesIO(data)) as file:
            found = file.read(MAX_UNPACKED_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f'source "{path}" is not a whole gzip file: {error}') from error
    if len(found) > MAX_UNPACKED_BYTES:
        raise InputError(f'source "{path}" unpacks to more than {MAX_UNPACKED_BYTES >> 30} GiB; split it')
    return found


def _read_json_list(data: bytes, path: Path) -> Iterator[RawRow]:
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f'source "{path}" is not a JSON list: {error}') from error
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, dict) else Unreadable("not a JSON object")


def _read_jsonl(data: bytes) -> Iterator[RawRow]:
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        # ValueError: no JSON, no UTF-8, or a number of thousands of digits.
        except (ValueError, RecursionError) as error:
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
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a long conversation is no broken file
    reader = csv.DictReader(io.StringIO(text, newline=""))
    _refuse_double_columns(reader.fieldnames or [], path)
    for number, row in enumerate(reader, start=1):
        if None in row or None in row.values():
            yield number, Unreadable("the number of cells differs from the header")
        else:
            yield number, dict(row)


def _read_parquet(data: bytes, path: Path) -> Iterator[RawRow]:
    import pyarrow as pa

    try:
        table = read_parquet(data)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f'source "{path}" is not a readable Parquet file: {reason}') from error
    _refuse_double_columns(table.schema.names, path)
    for start in range(0, table.num_rows, BATCH_ROWS):
        yield from enumerate(_python_rows(table.slice(start, BATCH_ROWS)), start=start + 1)


def _python_rows(table: "pa.Table") -> Iterator[dict[str, object] | Unreadable]:
    try:
        yield from table.to_pylist()
    except (UnicodeDecodeError, OverflowError) as error:
        if table.num_rows == 1:
            yield Unreadable(str(error))
            return
        for number in range(table.num_rows):
            yield from _python_rows(table.slice(number, 1))


def _refuse_double_columns(names: Sequence[str], path: Path) -> None:
    double = [name for name, count in Counter(names).items() if count > 1]
    if double:
        raise InputError(f'source "{path}" has {len(double)} column names twice, such as "{double[0]}"; rename one')


def _read_dataset(config: SourceConfig) -> Iterator[RawRow]:
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
