"""Rows of neurons in memory, matrix by matrix, as they are stored; and the one place where they become operands."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.edge.cache import Indices
from runtime.edge.layout import RecordLayout
from runtime.edge.quantise import dequantise
from runtime.edge.records import Matrix


class Rows:
    """`n` rows of every matrix of a record."""

    def __init__(self, n: int, record: RecordLayout, dtype: torch.dtype) -> None:
        self.record = record
        value_bytes, scale_bytes = record.row
        # Zeroed: rows whose gate is closed are multiplied by zero without having been read, and must be finite.
        self.values = {name: torch.zeros(n, value_bytes // dtype.itemsize, dtype=dtype) for name in record.matrices}
        self.scales = {name: torch.zeros(n, scale_bytes // 2, dtype=torch.float16) for name in record.matrices}
        self._bytes = [self._views(name) for name in record.matrices]

    def put(self, places: Indices, records: NDArray[np.uint8], chosen: Indices, part: slice) -> None:
        """Copy the matrices `part` of the records `chosen` (which start with the first of them) to `places`."""
        start = part.start * self.record.part_bytes % 64  # records start at multiples of 64, matrices need not
        for views in self._bytes[part]:
            for view in views:
                if view.shape[1]:
                    view[places] = records[:, start : start + view.shape[1]][chosen]
                    start += view.shape[1]

    def select(self, name: str, places: Tensor, into: Matrix) -> Matrix:
        """The rows `places` of a matrix, copied into the first rows of `into`."""
        n = len(places)
        values = torch.index_select(self.values[name], 0, places, out=into.values[:n])
        if into.scales is None:
            return Matrix(values, None, into.format)
        return Matrix(values, torch.index_select(self.scales[name], 0, places, out=into.scales[:n]), into.format)

    def _views(self, name: str) -> list[NDArray[np.uint8]]:
        tensors = (self.values[name], self.scales[name])
        return [tensor.view(torch.uint8).numpy() for tensor in tensors]


class Workspace:
    """Memory for one block of neurons as operands; whatever the rows come from, they are computed from here."""

    def __init__(self, block: int, record: RecordLayout, stored: torch.dtype, dtype: torch.dtype) -> None:
        self.block, self.record, self.dtype = block, record, dtype
        value_bytes, scale_bytes = record.row
        self.into = {
            name: Matrix(
                torch.empty(block, value_bytes // stored.itemsize, dtype=stored),
                torch.empty(block, scale_bytes // 2, dtype=torch.float16) if scale_bytes else None,
                record.format,
            )
            for name in record.matrices
        }

    def from_rows(self, rows: Rows, name: str, places: Tensor) -> Tensor:
        """The rows `places` (k, H) of a matrix, in the type that is computed in."""
        return dequantise(rows.select(name, places, self.into[name]), self.dtype)

    def from_records(self, records: NDArray[np.uint8], name: str) -> Tensor:
        """The rows (k, H) of a matrix out of whole records (k, stride)."""
        into, n = self.into[name], len(records)
        start = self.record.matrices.index(name) * self.record.part_bytes
        value_bytes, scale_bytes = self.record.row
        values, scales = into.values[:n], None if into.scales is None else into.scales[:n]
        values.view(torch.uint8).numpy()[:] = records[:, start : start + value_bytes]
        if scales is not None:
            scales.view(torch.uint8).numpy()[:] = records[:, start + value_bytes : start + value_bytes + scale_bytes]
        return dequantise(Matrix(values, scales, into.format), self.dtype)


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
