"""One token's products by compiled loops, where the extra `native` is installed; torch does them where it is not."""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.edge.records import LayerPredictor, Matrix

_VIEWS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
Numbers = NDArray[Any]
Places = NDArray[np.int64]
Function = TypeVar("Function", bound=Callable[..., Any])


@cache
def compiled(function: Function) -> Function:
    """`function`, a loop over numbers, compiled where numba is installed, which is loaded when this is first asked."""
    try:
        from numba import njit
    except ImportError:
        return function
    try:
        return cast(Function, njit(nogil=True, cache=True)(function))
    except RuntimeError:  # nowhere to keep what is compiled
        return function


class Kernels:
    """What one token (1, n) makes of rows as they are stored: float32 inside, rounded otherwise than by torch.

    `places` (k,) are the rows to take of a matrix; None takes all.
    """

    def __init__(self) -> None:
        from runtime.edge import native_kernels, native_scaled

        self.plain, self.scaled = native_kernels, native_scaled
        self.numbers = np.arange(1)

    def times(self, x: Tensor, matrix: Matrix, places: Tensor | None = None) -> Tensor:
        """(1, k) float32: x (1, H) times the rows."""
        chosen, vector = self._chosen(matrix, places), _vector(x)
        out = np.empty(chosen.size, np.float32)
        if matrix.scales is None:
            self.plain.dots(vector, as_numbers(matrix.values), chosen, out)
        else:
            group = vector.size // matrix.scales.shape[1]
            values, scales = matrix.values.numpy(), as_numbers(matrix.scales)
            if matrix.format == "int8":
                self.scaled.int8_loops(group)[0](vector, values, scales, chosen, out)
            else:
                halves = vector[0::2].copy(), vector[1::2].copy()
                self.scaled.int4_loops(group)[0](*halves, values, scales, chosen, out)
        return torch.from_numpy(out)[None]

    def mixed(self, weights: Tensor, matrix: Matrix, places: Tensor | None = None) -> Tensor:
        """(1, H) float32: the rows, weighted (1, k) and added up."""
        chosen, vector = self._chosen(matrix, places), _vector(weights)
        if matrix.scales is None:
            out = np.zeros(matrix.values.shape[1], np.float32)
            self.plain.add(vector, as_numbers(matrix.values), chosen, out)
            return torch.from_numpy(out)[None]
        values, scales = matrix.values.numpy(), as_numbers(matrix.scales)
        if matrix.format == "int8":
            out = np.zeros(values.shape[1], np.float32)
            self.scaled.int8_loops(out.size // scales.shape[1])[1](vector, values, scales, chosen, out)
            return torch.from_numpy(out)[None]
        halves = np.zeros((2, values.shape[1]), np.float32)
        self.scaled.int4_loops(halves.size // scales.shape[1])[1](vector, values, scales, chosen, *halves)
        return torch.from_numpy(halves.T.reshape(1, -1))

    def finished(self, x: Tensor, act: Tensor, up: Matrix, down: Matrix, places: Tensor | None = None) -> Tensor:
        """(1, H) float32: what neurons of activation `act` (1, k) put out; nothing is read of those where it is 0."""
        chosen = self._chosen(up, places)
        if up.scales is not None:
            is_open = torch.from_numpy(np.flatnonzero(_vector(act)))
            rest = torch.from_numpy(chosen)[is_open]
            return self.mixed(act[:, is_open] * self.times(x, up, rest), down, rest)
        out = np.zeros(down.values.shape[1], np.float32)
        self.plain.finish(_vector(x), _vector(act), as_numbers(up.values), as_numbers(down.values), chosen, out)
        return torch.from_numpy(out)[None]

    def relu_neurons(self, x: Tensor, gate: Matrix, up: Matrix, down: Matrix, places: Tensor | None = None) -> Tensor:
        """(1, H) float32: the same, their activation computed first."""
        if gate.scales is not None:
            return self.finished(x, torch.relu(self.times(x, gate, places)), up, down, places)
        out = np.zeros(down.values.shape[1], np.float32)
        rows = [as_numbers(matrix.values) for matrix in (gate, up, down)]
        self.plain.relu_neurons(_vector(x), *rows, self._chosen(gate, places), out)
        return torch.from_numpy(out)[None]

    def predicted(self, residual: Tensor, predictor: LayerPredictor, is_mirrored: bool) -> Places:
        """Sorted, the rows of fc2 whose score for a residual (1, H) is at least the threshold.

        fc2 lies column by column, for half of a code is zero, and as much of fc2 is not read. `is_mirrored`: fc1 is
        [V; -V].
        """
        fc1, columns = as_numbers(predictor.fc1), as_numbers(predictor.fc2.T)
        found = self.plain.predicted(_vector(residual), fc1, columns, is_mirrored, predictor.threshold)
        return cast(Places, found)

    def copy(self, memory: NDArray[np.uint8], starts: Places, places: Places, out: NDArray[np.uint8]) -> None:
        """out[places[i]] = the bytes of `memory` from starts[i] on."""
        self.plain.copy(memory, starts, places, out)

    def _chosen(self, matrix: Matrix, places: Tensor | None) -> Places:
        if places is not None:
            return cast(Places, places.numpy())
        n = matrix.values.shape[0]
        numbers = self.numbers
        if n > numbers.size:
            numbers = self.numbers = np.arange(n)
        return numbers[:n]


def as_matrix(rows: Tensor) -> Matrix:
    """Plain numbers as a matrix."""
    return Matrix(rows.detach(), None, cast(Any, str(rows.dtype).removeprefix("torch.")))


def kernels(dtype: torch.dtype) -> Kernels | None:
    """Those for a model that computes in `dtype`, if there are any."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return None
    try:
        return Kernels()
    except (ImportError, RuntimeError):  # RuntimeError: nowhere to keep what is compiled
        return None


def _vector(x: Tensor) -> Numbers:
    return x[0].float().contiguous().numpy()


def as_numbers(rows: Tensor) -> Numbers:
    """As the loops read them: numpy has no bfloat16."""
    return rows.view(_VIEWS.get(rows.dtype, rows.dtype)).numpy()
