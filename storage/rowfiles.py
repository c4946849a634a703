"""Rows as files for other tools: Parquet, JSON Lines, a JSON array or CSV; batch by batch, whole or not at all."""

import json
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from storage.errors import LakeError, StorageError
from storage.shards import ROW_GROUP_ROWS

# What one row group may hold in memory before it is written, whatever its number of rows.
ROW_GROUP_BYTES = 64 << 20
Write = Callable[[BinaryIO, pa.Schema, Iterable[pa.RecordBatch]], int]


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name, replacing an older one, only when the block ends without an error."""
    temporary = path.absolute().with_name(f".{path.name}.{uuid.uuid4().hex}")
    if path.exists() and not path.is_file():
        raise LakeError(f'"{path}" is not a plain file; give the name of a file')
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise LakeError(f'"{path}" cannot be written ({reason}); give a file in a writable folder') from error
    finally:
        temporary.unlink(missing_ok=True)


def write_parquet(sink: BinaryIO, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """Row groups of at most ROW_GROUP_ROWS rows or ROW_GROUP_BYTES; the number of rows."""
    n_rows = 0
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_index=True) as writer:
        for group in _gathered(batches):
            writer.write_table(group, row_group_size=ROW_GROUP_ROWS)
            n_rows += group.num_rows
    return n_rows


def write_csv(sink: BinaryIO, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """A header and one line per row; the number of rows. StorageError for a column that CSV cannot hold."""
    nested = next((field for field in schema if pa.types.is_nested(field.type)), None)
    if nested is not None:
        fix = f'write to_json("{nested.name}") in the SQL, or choose parquet or json'
        raise StorageError(f'column "{nested.name}" is a list or struct, which CSV cannot hold; {fix}')
    n_rows = 0
    with pacsv.CSVWriter(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            n_rows += batch.num_rows
    return n_rows


def write_jsonl(sink: BinaryIO, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """One JSON object per line; the number of rows."""
    return _write_objects(sink, batches, b"\n", b"\n" if schema.names else b"")


def write_json(sink: BinaryIO, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """One JSON array of objects; the number of rows."""
    sink.write(b"[\n")
    n_rows = _write_objects(sink, batches, b",\n", b"\n" if schema.names else b"")
    sink.write(b"]\n")
    return n_rows


WRITERS: dict[str, Write] = {
    ".parquet": write_parquet,
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".csv": write_csv,
}


def _write_objects(sink: BinaryIO, batches: Iterable[pa.RecordBatch], between: bytes, end: bytes) -> int:
    n_rows = 0
    for batch in batches:
        for row in batch.to_pylist():
            # No NaN: it would be no JSON.
            line = json.dumps(row, ensure_ascii=False, allow_nan=False, default=str).encode()
            sink.write((between if n_rows else b"") + line)
            n_rows += 1
    sink.write(end if n_rows else b"")
    return n_rows


def _gathered(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Batches joined into tables of the size of a row group."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        n_rows, n_bytes = sum(one.num_rows for one in held), sum(one.nbytes for one in held)
        if n_rows >= ROW_GROUP_ROWS or n_bytes >= ROW_GROUP_BYTES:
            yield pa.Table.from_batches(held)
            held = []
    if held:
        yield pa.Table.from_batches(held)
