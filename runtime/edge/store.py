"""Rows of neurons in memory, matrix by matrix, as they are stored; and the one place where they are multiplied."""

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

from runtime.edge.cache import Indices
from runtime.edge.layout import RecordLayout
from runtime.edge.native import Kernels
from runtime.edge.quantise import FLOATS
from runtime.edge.records import Matrix, WeightFormat
from runtime.hardware import factor_dtype


class Rows:
    """`n` rows of every matrix of a record."""

    def __init__(self, n: int, record: RecordLayout, dtype: torch.dtype, kernels: Kernels | None = None) -> None:
        self.record, self.kernels = record, kernels
        value_bytes, scale_bytes = record.row
        # Zeroed: rows whose gate is closed are multiplied by zero without having been read, and must be finite.
        self.matrices = {
            name: Matrix(
                torch.zeros(n, value_bytes // dtype.itemsize, dtype=dtype),
                torch.zeros(n, scale_bytes // 2, dtype=torch.float16) if scale_bytes else None,
                record.format,
            )
            for name in record.matrices
        }
        self._bytes = [self._views(name) for name in record.matrices]

    def put(self, places: Indices, memory: NDArray[np.uint8], starts: Indices, part: slice) -> None:
        """Copy the matrices `part` of records to `places`; they lie in `memory` from `starts` on."""
        for views in self._bytes[part]:
            for view in views:
                if self.kernels is not None:
                    self.kernels.copy(memory, starts, places, view)
                else:
                    view[places] = sliding_window_view(memory, view.shape[1])[starts]
                starts = starts + view.shape[1]

    def select(self, name: str, places: Tensor, into: Matrix) -> Matrix:
        """The rows `places` of a matrix, copied into the first rows of `into`."""
        matrix, n = self.matrices[name], len(places)
        values = torch.index_select(matrix.values, 0, places, out=into.values[:n])
        if matrix.scales is None or into.scales is None:
            return Matrix(values, None, into.format)
        return Matrix(values, torch.index_select(matrix.scales, 0, places, out=into.scales[:n]), into.format)

    def _views(self, name: str) -> list[NDArray[np.uint8]]:
        matrix = self.matrices[name]
        return [one.view(torch.uint8).numpy() for one in (matrix.values, matrix.scales) if one is not None]


class Workspace:
    """Memory for one block of neurons as operands; whatever the rows come from, they are multiplied here.

    An operand is valid until the next one is asked for. Nothing is allocated on the way: what the allocator keeps
    after many temporaries of a block's size is outside every budget.
    """

    def __init__(
        self, block: int, record: RecordLayout, stored: torch.dtype, dtype: torch.dtype, kernels: Kernels | None = None
    ) -> None:
        """`dtype` is what the model computes in, `self.dtype` what is multiplied in: see `factor_dtype`."""
        self.kernels = kernels
        self.record, self.dtype = record, factor_dtype(dtype)
        self.widens = self.dtype != dtype
        # Even so, one token's products are as fast as short floats come from memory, if the right function is asked.
        self.is_short = stored == dtype != self.dtype
        self.stored, self.places = stored, torch.arange(block)
        value_bytes, scale_bytes = record.row
        self.into = {
            name: Matrix(
                torch.empty(block, value_bytes // stored.itemsize, dtype=stored),
                torch.empty(block, scale_bytes // 2, dtype=torch.float16) if scale_bytes else None,
                record.format,
            )
            for name in record.matrices
        }
        wide, narrow, halves = _operand_parts(record.format, self.dtype)
        self.wide = torch.empty(block, record.cols if wide else 0)
        self.narrow = torch.empty(block, record.cols if narrow else 0, dtype=self.dtype)
        self.halves = torch.empty(block, record.cols // 2 if halves else 0, dtype=torch.uint8)

    def free_operand(self) -> Tensor | None:
        """Float32 memory for others to widen numbers in while no operand is valid; None where none need be."""
        wide = self.wide if self.wide.numel() else self.narrow
        return wide.view(-1) if self.widens and wide.numel() else None

    def operand(self, matrix: Matrix, rows: slice = slice(None)) -> Tensor:
        """These rows (a block at most) in the type that is computed in, bit for bit those of `dequantise`."""
        values = matrix.values[rows]
        if values.dtype == self.dtype:
            return values
        if matrix.scales is None:
            return self.narrow[: len(values)].copy_(values)
        wide, scales = self.wide[: len(values)], matrix.scales[rows]
        if matrix.format == "int4":
            halves = self.halves[: len(values)]
            wide[:, 0::2] = torch.bitwise_and(values, 15, out=halves)
            wide[:, 1::2] = torch.bitwise_right_shift(values, 4, out=halves)
            wide -= 8
        else:
            wide.copy_(values)
        wide.view(*scales.shape, -1).mul_(scales.to(torch.float32).unsqueeze(-1))
        return wide if self.dtype == torch.float32 else self.narrow[: len(values)].copy_(wide)

    def times(self, x: Tensor, matrix: Matrix, rows: slice = slice(None)) -> Tensor:
        """(T, k): x (T, H) times these rows (k, H), a block at most."""
        if self.kernels is not None and len(x) == 1:
            return self.kernels.times(x, _rows_of(matrix, rows))
        if self.is_short and len(x) == 1:
            return linear(x.to(self.stored), matrix.values[rows])
        return linear(x, self.operand(matrix, rows))

    def mixed(self, weights: Tensor, matrix: Matrix, rows: slice = slice(None)) -> Tensor:
        """(T, H): these rows, weighted (T, k) and added up."""
        if self.kernels is not None and len(weights) == 1:
            return self.kernels.mixed(weights, _rows_of(matrix, rows))
        if self.is_short and len(weights) == 1:
            return self._bag(weights, matrix.values[rows], self.places[: weights.shape[1]])
        return weights @ self.operand(matrix, rows)

    def times_rows(self, x: Tensor, rows: Rows, name: str, places: Tensor) -> Tensor:
        """(T, k): x (T, H) times the rows `places` of a matrix, a block at most."""
        if self.kernels is not None and len(x) == 1:
            return self.kernels.times(x, rows.matrices[name], places)
        return self.times(x, self.from_rows(rows, name, places))

    def mixed_rows(self, weights: Tensor, rows: Rows, name: str, places: Tensor) -> Tensor:
        """(T, H): the rows `places` of a matrix, weighted (T, k) and added up."""
        if self.is_short and len(weights) == 1:
            return self._bag(weights, rows.matrices[name].values, places)
        return weights @ self.operand(self.from_rows(rows, name, places))

    def from_rows(self, rows: Rows, name: str, places: Tensor) -> Matrix:
        """The rows `places` (k, H) of a matrix, as they are stored."""
        return rows.select(name, places, self.into[name])

    def from_records(self, records: NDArray[np.uint8], name: str) -> Matrix:
        """The rows (k, H) of a matrix out of whole records (k, stride), as they are stored."""
        into, n = self.into[name], len(records)
        start = self.record.matrices.index(name) * self.record.part_bytes
        value_bytes, scale_bytes = self.record.row
        values, scales = into.values[:n], None if into.scales is None else into.scales[:n]
        values.view(torch.uint8).numpy()[:] = records[:, start : start + value_bytes]
        if scales is not None:
            scales.view(torch.uint8).numpy()[:] = records[:, start + value_bytes : start + value_bytes + scale_bytes]
        return Matrix(values, scales, into.format)

    def _bag(self, weights: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """One token's sum over rows of short floats; the sum is one of float32 inside."""
        return embedding_bag(places[None], rows, per_sample_weights=weights.to(self.stored), mode="sum")


def _rows_of(matrix: Matrix, rows: slice) -> Matrix:
    return Matrix(matrix.values[rows], None if matrix.scales is None else matrix.scales[rows], matrix.format)


def workspace_bytes(block: int, record: RecordLayout, dtype: torch.dtype) -> int:
    """What the `Workspace` of a model that computes in `dtype` takes.

    With the scales of a block in float32, and the rows that are on their way to slots.
    """
    dtype = factor_dtype(dtype)
    wide, narrow, halves = _operand_parts(record.format, dtype)
    operand = record.cols * (4 * wide + dtype.itemsize * narrow) + record.cols // 2 * halves
    return block * (record.record_bytes + record.part_bytes + 2 * record.row[1] + operand)


def _operand_parts(format: WeightFormat, dtype: torch.dtype) -> tuple[bool, bool, bool]:
    """Whether a block is kept in float32, in the type that is computed in, and in halves of bytes."""
    is_integer = format not in FLOATS
    return is_integer, (dtype != torch.float32 if is_integer else FLOATS[format] != dtype), format == "int4"


def hot_matrices(block: Tensor, n_hot: int, record: RecordLayout, stored: torch.dtype) -> dict[str, Matrix]:
    """The matrices of a hot block (uint8), each a view of it."""
    found: dict[str, Matrix] = {}
    for name, (start, n_values, n_scales) in zip(record.matrices, record.hot_parts(n_hot), strict=True):
        values = block[start : start + n_values].view(stored).view(n_hot, record.row[0] // stored.itemsize)
        scales = block[start + n_values : start + n_values + n_scales]
        found[name] = Matrix(
            values, scales.view(torch.float16).view(n_hot, record.row[1] // 2) if n_scales else None, record.format
        )
    return found
