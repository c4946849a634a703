"""Histograms per group with round edges, counted in DuckDB: the rows are never in memory at once."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

# DuckDB not at run time: a pydantic model keeps its module, and it then complains of leaks when the process ends.
if TYPE_CHECKING:
    import duckdb
    from pyarrow.dataset import Dataset

BINS = 20  # about


class Histogram(BaseModel):
    """`edges` has one more entry than each group's counts; a bin holds its lower edge."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    edges: list[float]
    counts: dict[str, list[int]]

    @property
    def totals(self) -> list[int]:
        """Counts over all groups."""
        return [sum(each) for each in zip(*self.counts.values(), strict=True)]


@dataclass(frozen=True, slots=True)
class _Bins:
    """Bin number `floor(value * multiplier / divisor)`, from `first` on; one of the two is 1.

    Multiplying by 10 puts 0.3 where it belongs; dividing by 0.1 does not.
    """

    multiplier: float
    divisor: float
    first: int
    count: int

    @property
    def edges(self) -> list[float]:
        return [(self.first + place) / self.multiplier * self.divisor for place in range(self.count + 1)]


def histogram(data: "pa.Table | Dataset", column: str) -> Histogram | None:
    """Of a numeric column, per value of the column `group`; None where no value is a finite number."""
    import duckdb

    assert column in data.schema.names
    with duckdb.connect() as connection:
        connection.register("data", data)
        return histogram_of(connection, f'SELECT "group", "{column}" AS value FROM data')


def histogram_of(connection: "duckdb.DuckDBPyConnection", rows: str) -> Histogram | None:
    """The same for a query of ours with the columns `group` and `value`."""
    finite = f"SELECT * FROM ({rows}) WHERE isfinite(value)"
    lowest, highest = connection.execute(f"SELECT MIN(value), MAX(value) FROM ({finite})").fetchall()[0]
    if lowest is None:
        return None
    bins = _bins(float(lowest), float(highest))
    counted = connection.execute(
        f'SELECT "group", floor(value * $m / $d)::BIGINT - $first AS bin, COUNT(*) FROM ({finite}) GROUP BY ALL',
        {"m": bins.multiplier, "d": bins.divisor, "first": bins.first},
    ).fetchall()
    counts = {group: [0] * bins.count for group in sorted({str(row[0]) for row in counted})}
    for group, place, count in counted:
        counts[str(group)][place] = count
    return Histogram(edges=bins.edges, counts=counts)


def _bins(lowest: float, highest: float) -> _Bins:
    # Divided first: the difference of two large numbers may be infinite.
    width = highest / BINS - lowest / BINS
    largest = max(abs(lowest), abs(highest))
    if width < 1e-9 * largest:  # edges that close would no longer differ from each other
        width = largest / 10
    power = math.floor(math.log10(max(width, 1e-300))) if width else 0
    factor = next(factor for factor in (1, 2, 5, 10) if factor * 10.0**power >= width * (1 - 1e-9))
    multiplier = 10.0**-power / factor if power < 0 else 1.0
    divisor = 1.0 if power < 0 else factor * 10.0**power
    first = math.floor(lowest * multiplier / divisor)
    return _Bins(multiplier, divisor, first, math.floor(highest * multiplier / divisor) - first + 1)
