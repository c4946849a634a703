"""How the neurons of a bundle lie in its file: what a record is, and where layers start."""

from dataclasses import dataclass

from runtime.edge.quantise import row_bytes
from runtime.edge.records import WeightFormat

ALIGN = 4096  # what O_DIRECT asks of offsets, lengths and memory
UNIT = 64  # records start at a multiple of it
MOST_PADDING = 1.125  # a record that fits whole pages with no more than this is padded to them
ALL_MATRICES = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """One neuron: a row each of gate, up and down (gate not where it is resident), values then scales."""

    cols: int
    format: WeightFormat
    group: int
    has_gate: bool = True

    @property
    def matrices(self) -> tuple[str, ...]:
        """The matrices of a record, in order."""
        return ALL_MATRICES if self.has_gate else ALL_MATRICES[1:]

    @property
    def row(self) -> tuple[int, int]:
        """Bytes of a row's values and of its scales."""
        return row_bytes(self.cols, self.format, self.group)

    @property
    def part_bytes(self) -> int:
        """Bytes of a matrix' part of a record."""
        return sum(self.row)

    @property
    def record_bytes(self) -> int:
        """Bytes of a neuron."""
        return len(self.matrices) * self.part_bytes

    @property
    def stride(self) -> int:
        """Bytes from one cold record to the next."""
        paged = aligned(self.record_bytes)
        return paged if paged <= MOST_PADDING * self.record_bytes else aligned(self.record_bytes, UNIT)

    def hot_parts(self, n_hot: int) -> list[tuple[int, int, int]]:
        """(start, bytes of values, bytes of scales) of each matrix in the hot block, which is matrix by matrix."""
        values, scales = (n_hot * size for size in self.row)
        return [(index * (values + scales), values, scales) for index in range(len(self.matrices))]


def aligned(n_bytes: int, to: int = ALIGN) -> int:
    """The next multiple of `to`."""
    return -(-n_bytes // to) * to
