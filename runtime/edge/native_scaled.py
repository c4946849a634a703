"""As `native_kernels`, for levels of int8 and int4 with a float16 scale per group of columns (as int16).

A byte of int4 has two levels, the even column's below; its vectors come as their even and their odd columns. Loops over
a group are compiled for its size: of unknown length they would be worked off number by number.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit

from runtime.edge.native_kernels import OPTIONS, wide

Loop = Callable[..., None]


@lru_cache
def int8_loops(group: int) -> tuple[Loop, Loop]:
    """`dots` and `add` for groups of so many columns."""

    @njit(**OPTIONS)
    def dots(x: Any, rows: Any, scales: Any, places: Any, out: Any) -> None:
        scaled = np.empty(len(x), np.float32)
        for i in range(len(places)):
            row, scale = rows[places[i]], scales[places[i]]
            for part in range(len(scale)):
                factor = wide(scale[part])
                for j in range(group):
                    scaled[part * group + j] = factor * x[part * group + j]
            total = np.float32(0)
            for j in range(len(x)):
                total += scaled[j] * np.float32(row[j])
            out[i] = total

    @njit(**OPTIONS)
    def add(weights: Any, rows: Any, scales: Any, places: Any, out: Any) -> None:
        factors = np.empty(len(out), np.float32)
        for i in range(len(places)):
            row, scale = rows[places[i]], scales[places[i]]
            for part in range(len(scale)):
                factor = weights[i] * wide(scale[part])
                for j in range(group):
                    factors[part * group + j] = factor
            for j in range(len(out)):
                out[j] += factors[j] * np.float32(row[j])

    return dots, add


@lru_cache
def int4_loops(group: int) -> tuple[Loop, Loop]:
    """`dots` and `add` for groups of so many columns."""
    half = group // 2

    @njit(**OPTIONS)
    def dots(even: Any, odd: Any, rows: Any, scales: Any, places: Any, out: Any) -> None:
        for i in range(len(places)):
            row, scale = rows[places[i]], scales[places[i]]
            total = np.float32(0)
            for part in range(len(scale)):
                inner = np.float32(0)
                for j in range(half):
                    both = np.int32(row[part * half + j])
                    low, high = np.float32((both & 15) - 8), np.float32((both >> 4) - 8)
                    inner += low * even[part * half + j] + high * odd[part * half + j]
                total += wide(scale[part]) * inner
            out[i] = total

    @njit(**OPTIONS)
    def add(weights: Any, rows: Any, scales: Any, places: Any, even: Any, odd: Any) -> None:
        for i in range(len(places)):
            row, scale = rows[places[i]], scales[places[i]]
            for part in range(len(scale)):
                factor = weights[i] * wide(scale[part])
                for j in range(half):
                    both = np.int32(row[part * half + j])
                    even[part * half + j] += factor * np.float32((both & 15) - 8)
                    odd[part * half + j] += factor * np.float32((both >> 4) - 8)

    return dots, add
