"""Which bytes to read for some neurons of a layer: neighbours share a read, and reads are started some at a time."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.edge.layout import ALIGN
from runtime.edge.native import compiled

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Ranges:
    """Where `n_bytes` of every record are wanted: the record of position p has them from `offset + p * stride` on."""

    offset: int
    stride: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Limits:
    """`gap`: records that may lie unused between two that share a read. At most, per start: reads, and bytes."""

    gap: int
    n_reads: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Start:
    """Reads that are started together.

    reads: (n, 3) offset in the file, start in memory, bytes. inside: where in memory each neuron's bytes are. They
    are the neurons `first` to `last` of those asked for.
    """

    reads: Integers
    inside: Integers
    first: int
    last: int


def read_starts(positions: Integers, ranges: Ranges, limits: Limits) -> list[Start]:
    """Sorted positions as aligned reads; memory of every start is counted from zero."""
    reads, inside, starts, neurons = compiled(_lay_out)(
        positions, ranges.offset, ranges.stride, ranges.n_bytes, limits.gap, limits.n_reads, limits.n_bytes
    )
    ends = zip(starts[:-1].tolist(), starts[1:].tolist(), neurons[:-1].tolist(), neurons[1:].tolist(), strict=True)
    return [Start(reads[a:b], inside[first:end], first, end - 1) for a, b, first, end in ends]


def _lay_out(
    positions: Integers, offset: int, stride: int, n_bytes: int, gap: int, most_reads: int, most_bytes: int
) -> tuple[Integers, Integers, Integers, Integers]:
    """Reads, place of each neuron; first read and first neuron of each start, and one more of both."""
    n = len(positions)
    reads, inside = np.empty((n, 3), np.int64), np.empty(n, np.int64)
    starts, neurons = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64)
    n_reads, n_starts, filled = 0, 0, 0
    i = 0
    while i < n:
        begin = (offset + positions[i] * stride) // ALIGN * ALIGN
        end = (offset + positions[i] * stride + n_bytes + ALIGN - 1) // ALIGN * ALIGN
        j = i + 1
        while j < n and positions[j] - positions[j - 1] <= gap + 1:
            further = (offset + positions[j] * stride + n_bytes + ALIGN - 1) // ALIGN * ALIGN
            if further - begin > most_bytes:
                break
            end = further
            j += 1
        if n_reads - starts[n_starts] == most_reads or filled + end - begin > most_bytes:
            n_starts += 1
            starts[n_starts], neurons[n_starts], filled = n_reads, i, 0
        reads[n_reads] = begin, filled, end - begin
        for k in range(i, j):
            inside[k] = filled + offset + positions[k] * stride - begin
        filled += end - begin
        n_reads += 1
        i = j
    starts[n_starts + 1], neurons[n_starts + 1] = n_reads, n
    return reads[:n_reads], inside, starts[: n_starts + 2], neurons[: n_starts + 2]
