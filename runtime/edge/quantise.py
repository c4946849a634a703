"""Weights in fewer bits: int8 and int4 with one scale per group of columns, and back."""

import torch
from torch import Tensor

from runtime.edge.records import Matrix, WeightFormat
from runtime.errors import ConfigError, ModelError

FLOATS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
TOP = {"int8": 127, "int4": 7}  # the largest level; int4 goes down to -8
DEFAULT_GROUP = 32
# int4 keeps, per group, whichever of these fractions of the widest scale has the least squared error.
FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


def quantise(weight: Tensor, format: WeightFormat, group: int = DEFAULT_GROUP) -> Matrix:
    """`weight` (rows, cols) in a format; integers have a scale per `group` columns of a row, and no offset."""
    if not torch.isfinite(weight).all():
        raise ModelError("a weight is not a finite number; the model cannot be exported")
    if format in FLOATS:
        return Matrix(_as_float(weight, format), None, format)
    cols = weight.shape[1]
    if group < 2 or cols % group or group % 2:
        raise ConfigError(f"group = {group} must be even and divide the {cols} columns; use {_fitting(cols)}")
    parts = weight.to(torch.float32).reshape(len(weight), -1, group)
    levels, scales = _int8(parts) if format == "int8" else _int4(parts)
    values = levels.flatten(1)
    return Matrix(_pack(values) if format == "int4" else values, scales.squeeze(-1), format)


def dequantise(matrix: Matrix, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights (rows, cols) that `matrix` stands for; any selection of rows of values and scales works too."""
    if matrix.scales is None:
        return matrix.values.to(dtype)
    levels = unpack(matrix.values) if matrix.format == "int4" else matrix.values
    groups = levels.to(torch.float32).reshape(*matrix.scales.shape, -1)
    return (groups * matrix.scales.to(torch.float32).unsqueeze(-1)).flatten(1).to(dtype)


def row_bytes(cols: int, format: WeightFormat, group: int = DEFAULT_GROUP) -> tuple[int, int]:
    """Bytes of a row's values, and of its scales."""
    if format in FLOATS:
        return cols * FLOATS[format].itemsize, 0
    return (cols if format == "int8" else cols // 2), cols // group * 2


def unpack(values: Tensor) -> Tensor:
    """Levels -8..7 (rows, cols) as int8 of packed bytes (rows, cols / 2); the low half of a byte is the even column."""
    halves = torch.stack([values & 15, values >> 4], dim=-1)
    return halves.flatten(1).to(torch.int8) - 8


def _pack(levels: Tensor) -> Tensor:
    shifted = (levels + 8).to(torch.uint8)
    return shifted[:, 0::2] | (shifted[:, 1::2] << 4)


def _int8(parts: Tensor) -> tuple[Tensor, Tensor]:
    scales = _float16_above(parts.abs().amax(dim=-1, keepdim=True) / TOP["int8"])
    return _levels(parts, scales, "int8"), scales


def _int4(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Every scale may be negative, so that the widest value of a group can take the level -8."""
    widest = parts.gather(-1, parts.abs().argmax(dim=-1, keepdim=True))
    tried = [widest.abs() / 7 * fraction for fraction in FRACTIONS] + [widest / -8]
    best, scales, levels = torch.full_like(widest, torch.inf), torch.zeros_like(widest, dtype=torch.float16), None
    for candidate in tried:
        rounded = _float16_above(candidate)
        found = _levels(parts, rounded, "int4")
        error = (found * rounded.float() - parts).square().sum(dim=-1, keepdim=True)
        is_better = error < best
        best, scales = torch.where(is_better, error, best), torch.where(is_better, rounded, scales)
        levels = found if levels is None else torch.where(is_better, found, levels)
    assert levels is not None
    return levels, scales


def _levels(parts: Tensor, scales: Tensor, format: str) -> Tensor:
    wide = scales.to(torch.float32)
    ratio = torch.where(wide == 0, 0.0, parts / torch.where(wide == 0, 1.0, wide))
    low = -127 if format == "int8" else -8
    return ratio.round().clamp(low, TOP[format]).to(torch.int8)


def _float16_above(scales: Tensor) -> Tensor:
    """float16, never nearer to zero than `scales`: the widest value of a group is not clipped."""
    rounded = scales.to(torch.float16)
    if not torch.isfinite(rounded).all():
        raise ModelError(f"a weight needs a scale of {float(scales.abs().max()):.3g}, above float16; use float32")
    is_below = rounded.float().abs() < scales.abs()
    return torch.where(is_below, (rounded.view(torch.int16) + 1).view(torch.float16), rounded)


def _as_float(weight: Tensor, format: str) -> Tensor:
    found = weight.to(FLOATS[format])
    if not torch.isfinite(found).all():
        raise ModelError(f"a weight of {float(weight.abs().max()):.3g} is above {format}; use bfloat16 or float32")
    return found


def _fitting(cols: int) -> int | str:
    return next((group for group in (64, 32, 16, 8, 4, 2) if cols % group == 0), "float16 instead of integers")
