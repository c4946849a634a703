"""Products of one vector with scattered rows of short numbers, compiled by numba: read once, widened on the way.

Four rows at a time, because the processor fetches several from memory at once; how a row is summed up does not depend
on which others it is asked for with. `rows` hold bfloat16 as uint16, float16 as int16, or float32. Inner loops count
from zero: of an index that is a sum numba asks whether it is negative, and computes number by number.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# Sums may be reordered, or they would be computed number by number; what is not finite stays so.
FAST = {"reassoc", "contract", "nsz"}
OPTIONS: dict[str, Any] = {"fastmath": FAST, "nogil": True, "cache": True, "error_model": "numpy"}


@intrinsic
def wide(context: Any, number: Any) -> Any:
    """float32 of a number as `rows` hold it."""

    def widened(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if number == types.float32:
            return arguments[0]
        if number == types.int16:
            return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())
        whole = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(whole, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(number), widened


@njit(**OPTIONS)
def dots(x: Any, rows: Any, places: Any, out: Any) -> None:
    """out[i] = rows[places[i]] . x."""
    last = len(places) - 1
    for i in range(0, len(places), 4):
        i1, i2, i3 = min(i + 1, last), min(i + 2, last), min(i + 3, last)
        r0, r1, r2, r3 = rows[places[i]], rows[places[i1]], rows[places[i2]], rows[places[i3]]
        s0 = s1 = s2 = s3 = np.float32(0)
        for j in range(len(x)):
            s0 += wide(r0[j]) * x[j]
            s1 += wide(r1[j]) * x[j]
            s2 += wide(r2[j]) * x[j]
            s3 += wide(r3[j]) * x[j]
        out[i], out[i1], out[i2], out[i3] = s0, s1, s2, s3


@njit(**OPTIONS)
def add(weights: Any, rows: Any, places: Any, out: Any) -> None:
    """out += weights[i] * rows[places[i]], over all i."""
    last, none = len(places) - 1, np.float32(0)
    for i in range(0, len(places), 4):
        i1, i2, i3 = min(i + 1, last), min(i + 2, last), min(i + 3, last)
        r0, r1, r2, r3 = rows[places[i]], rows[places[i1]], rows[places[i2]], rows[places[i3]]
        w0 = weights[i]
        w1 = weights[i1] if i + 1 <= last else none
        w2 = weights[i2] if i + 2 <= last else none
        w3 = weights[i3] if i + 3 <= last else none
        for j in range(len(out)):
            out[j] += w0 * wide(r0[j]) + w1 * wide(r1[j]) + w2 * wide(r2[j]) + w3 * wide(r3[j])


@njit(**OPTIONS)
def finish(x: Any, act: Any, up: Any, down: Any, places: Any, out: Any) -> None:
    """out += act[i] * (up[places[i]] . x) * down[places[i]], over all i; where act is zero nothing is read."""
    is_open = np.flatnonzero(act)
    chosen, hidden = places[is_open], np.empty(len(is_open), np.float32)
    dots(x, up, chosen, hidden)
    for i in range(len(is_open)):
        hidden[i] *= act[is_open[i]]
    add(hidden, down, chosen, out)


@njit(**OPTIONS)
def relu_neurons(x: Any, gate: Any, up: Any, down: Any, places: Any, out: Any) -> None:
    """out += what these neurons add to the residual."""
    act = np.empty(len(places), np.float32)
    dots(x, gate, places, act)
    for i in range(len(act)):
        act[i] = max(act[i], np.float32(0))
    finish(x, act, up, down, places, out)


@njit(**OPTIONS)
def attend(queries: Any, keys: Any, values: Any, out: Any) -> None:
    """out[h] = softmax(keys . queries[h]) @ values, for heads h that share keys and values; queries are scaled."""
    places, scores = np.arange(len(keys)), np.empty(len(keys), np.float32)
    for h in range(len(queries)):
        dots(queries[h], keys, places, scores)
        top = scores.max()
        total = np.float32(0)
        for i in range(len(scores)):
            scores[i] = np.exp(scores[i] - top)
            total += scores[i]
        for i in range(len(scores)):
            scores[i] /= total
        out[h] = 0
        add(scores, values, places, out[h])


@njit(**OPTIONS)
def predicted(x: Any, fc1: Any, columns: Any, is_mirrored: Any, threshold: Any) -> Any:
    """Sorted i with (relu(fc1 @ x) @ columns)[i] >= threshold; `is_mirrored`: fc1 is [V; -V]."""
    n = len(fc1) // 2 if is_mirrored else len(fc1)
    code = np.empty(n, np.float32)
    dots(x, fc1, np.arange(n), code)
    if is_mirrored:
        code = np.concatenate((code, -code))
    is_open = np.flatnonzero(code > 0)
    scores = np.zeros(columns.shape[1], np.float32)
    add(code[is_open], columns, is_open, scores)
    return np.flatnonzero(scores >= threshold)


@njit(**OPTIONS)
def copy(memory: Any, starts: Any, places: Any, out: Any) -> None:
    """out[places[i]] = the bytes of `memory` from starts[i] on."""
    for i in range(len(places)):
        row, source = out[places[i]], memory[starts[i] : starts[i] + out.shape[1]]
        for j in range(len(row)):
            row[j] = source[j]
