"""Versions of the lake in the layouts of trainers, streamed: one SELECT of storage/layouts.py, batch by batch."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads

from storage.errors import LakeError, ViewError
from storage.lake import DatasetRef, Lake
from storage.layouts import LAYOUTS, Layout
from storage.rowfiles import WRITERS, whole_file
from storage.schema import TABLES

# Rows of the lake that are in memory at once.
BATCH_ROWS = 1000
# One thread and no reading ahead: memory stays that of a row group.
_SMALL = {
    "batch_readahead": 0,
    "fragment_readahead": 0,
    "use_threads": False,
    "fragment_scan_options": pads.ParquetFragmentScanOptions(use_buffered_stream=True, pre_buffer=False),
}


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rows, in which layout; `skip_unfit` leaves out the rows that the layout cannot carry."""

    layout: str
    split: str | None = None
    group: str | None = None
    skip_unfit: bool = False


@dataclass(frozen=True, slots=True)
class Written:
    """What a view wrote, and the rows it left out, by reason."""

    columns: list[str]
    n_rows: int
    unfit: Mapping[str, int]


def layout_named(name: str) -> Layout:
    """A layout by its name; ViewError lists them."""
    if name not in LAYOUTS:
        raise ViewError(f'format "{name}" is unknown; formats: {", ".join(LAYOUTS)}')
    return LAYOUTS[name]


def write_view(lake: Lake, ref: DatasetRef, selection: Selection, path: Path) -> Written:
    """Write a version to `path`, whole or not at all; the suffix decides the file format.

    ViewError when rows do not fit the layout (unless they are to be skipped) and when there is nothing to write.
    """
    layout = layout_named(selection.layout)
    if path.suffix not in layout.suffixes:
        allowed = ", ".join(layout.suffixes)
        raise ViewError(f'"{path}": the format "{selection.layout}" is written to files that end in {allowed}')
    rows = ViewRows(lake, ref, selection)
    with whole_file(path) as file:
        n_rows = WRITERS[path.suffix](file, rows.schema, rows)
        rows.check(n_rows)
    return Written(rows.schema.names, n_rows, dict(rows.unfit))


def first_rows(lake: Lake, ref: DatasetRef, selection: Selection, n_rows: int) -> list[dict[str, object]]:
    """The first rows of a view; what does not fit is only looked for up to there."""
    rows = ViewRows(lake, ref, selection)
    found: list[dict[str, object]] = []
    for batch in rows:
        found += batch.slice(0, n_rows - len(found)).to_pylist()
        if len(found) == n_rows:
            break
    rows.check(len(found))
    return found


class ViewRows:
    """The rows of a view, in the lake's order; `unfit` counts what its layout cannot carry, as far as read."""

    def __init__(self, lake: Lake, ref: DatasetRef, selection: Selection) -> None:
        self.ref = ref
        self.selection = selection
        self.layout = layout_named(selection.layout)
        self.unfit: Counter[str] = Counter()
        self._dataset = _source(lake, ref, self.layout, selection.split)
        with duckdb.connect() as connection:
            self.schema = _select(connection, self.layout, TABLES[self.layout.table].empty_table()).schema

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        self.unfit.clear()
        with duckdb.connect() as connection:
            for rows in self._batches():
                try:
                    found = _select(connection, self.layout, self._fitting(connection, rows))
                except duckdb.Error as error:
                    raise self._damaged(error) from error
                yield from found.to_batches()

    def check(self, n_rows: int) -> None:
        """ViewError unless every row that was read fits (or may be skipped) and at least one was."""
        name = self.selection.layout
        if self.unfit and not self.selection.skip_unfit:
            reasons = "; ".join(f"{count}: {reason}" for reason, count in self.unfit.most_common())
            fix = "leave them out with --skip-unfit, or take another format such as trl"
            raise ViewError(
                f'{self.ref}: the format "{name}" cannot carry {self.unfit.total()} rows ({reasons}); {fix}'
            )
        if n_rows == 0 and self.unfit:
            raise ViewError(f'{self.ref}: the format "{name}" can carry none of {self.unfit.total()} rows')
        if n_rows == 0:
            raise ViewError(f"{self.ref} has no such rows; {self._groups()}")

    def _batches(self) -> Iterator[pa.Table]:
        group = self.selection.group
        chosen = None if group is None else pads.field("group") == group
        try:
            for batch in self._dataset.to_batches(filter=chosen, batch_size=BATCH_ROWS, **_SMALL):
                if batch.num_rows:
                    batch.validate(full=True)  # bytes that are no UTF-8
                    yield pa.Table.from_batches([batch])
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> LakeError:
        table, reason = self.layout.table, str(error).splitlines()[0]
        return LakeError(f"{self.ref}: {table} is damaged ({reason}); see `winnow verify {self.ref}`")

    def _fitting(self, connection: duckdb.DuckDBPyConnection, rows: pa.Table) -> pa.Table:
        """The rows that the layout can carry; the others are counted."""
        cases = " ".join(f"WHEN {condition} THEN {n}" for n, (_, condition) in enumerate(self.layout.cannot_carry))
        connection.register(self.layout.table, rows)
        found = connection.sql(f"SELECT CASE {cases} END AS rule FROM {self.layout.table}").to_arrow_table()
        broken = found["rule"].combine_chunks()
        if broken.null_count == len(broken):
            return rows
        for rule in broken.drop_null().to_pylist():
            self.unfit[self.layout.cannot_carry[rule][0]] += 1
        return rows.filter(broken.is_null())

    def _groups(self) -> str:
        groups: set[str] = set()
        for batch in self._dataset.to_batches(columns=["group"], **_SMALL):
            groups.update(batch["group"].unique().to_pylist())
        return f"its groups: {', '.join(sorted(groups))}" if groups else "its table is empty"


def _source(lake: Lake, ref: DatasetRef, layout: Layout, split: str | None) -> pads.Dataset:
    """The table that the layout reads; ViewError names the reference or the split to give instead."""
    manifest = lake.manifest(ref)
    splits = sorted({str(file.split) for file in manifest.shards(layout.table)})
    if not splits:
        made_from = [text for text in manifest.inputs.values() if text.startswith(f"{layout.table}/")]
        fix = f"give {made_from[0]}, which it was made from" if made_from else f"give a {layout.table}/NAME"
        raise ViewError(f"{ref} has no table {layout.table}, which this format needs; {fix}")
    if split is None and len(splits) > 1:
        raise ViewError(f"{ref} has the splits {', '.join(splits)}; choose one with --split")
    if split is not None and split not in splits:
        raise ViewError(f'{ref} has no split "{split}"; its splits: {", ".join(splits)}')
    return lake.dataset(ref, layout.table, split)


def _select(connection: duckdb.DuckDBPyConnection, layout: Layout, rows: pa.Table) -> pa.Table:
    connection.register(layout.table, rows)
    return connection.sql(layout.sql).to_arrow_table()
