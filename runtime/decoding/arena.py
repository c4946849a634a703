"""The memory of a decoding run: one preallocated block of keys and values, compacted in place.

Rows 0 to n_live - 1 are in use. A token at position p of a row lies in slot p of that row.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class ArenaShape:
    """Size of an arena: rows, slots (tokens) per row, and what one token of one row holds."""

    n_layers: int
    n_rows: int
    n_kv_heads: int
    n_slots: int
    head_dim: int

    @classmethod
    def of(cls, model: PreTrainedModel, n_rows: int, n_slots: int) -> "ArenaShape":
        """The shape that `model` needs."""
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, n_rows, config.num_key_value_heads, n_slots, head_dim)


class Arena:
    """Keys and values of all live rows: (layers, 2, rows, kv_heads, slots, head_dim)."""

    def __init__(self, shape: ArenaShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        size = (shape.n_layers, 2, shape.n_rows, shape.n_kv_heads, shape.n_slots, shape.head_dim)
        # Zeros, not empty: masked slots are multiplied by weight 0, and 0 * NaN would be NaN.
        self.memory = torch.zeros(size, dtype=dtype, device=device)
        self.n_live = 0

    @property
    def n_free(self) -> int:
        """Rows that a new prompt can take."""
        return self.shape.n_rows - self.n_live

    def take(self, n_rows: int) -> slice:
        """Reserve the next `n_rows` rows."""
        assert n_rows <= self.n_free
        rows = slice(self.n_live, self.n_live + n_rows)
        self.n_live += n_rows
        return rows

    def keys(self, layer: int) -> Tensor:
        """(rows, kv_heads, slots, head_dim), a view."""
        return self.memory[layer, 0]

    def values(self, layer: int) -> Tensor:
        """(rows, kv_heads, slots, head_dim), a view."""
        return self.memory[layer, 1]

    def release(self, leaving: Collection[int], n_slots: int) -> "Moves":
        """Free rows and close the holes with the last live rows; at most one row copy per freed row.

        n_slots: how many slots of the moved rows hold something. Apply the returned moves to anything kept per row.
        """
        moves = plan_moves(self.n_live, leaving)
        self.n_live -= len(leaving)
        if moves.source:
            self.memory[:, :, moves.target, :, :n_slots] = self.memory[:, :, moves.source, :, :n_slots]
        return moves


@dataclass(frozen=True, slots=True)
class Moves:
    """Row `source[i]` moved to row `target[i]`; sources and targets are disjoint."""

    source: list[int]
    target: list[int]


def plan_moves(n_live: int, leaving: Collection[int]) -> Moves:
    """How to fill the holes of `leaving` so that the remaining rows are 0 to n_live - len(leaving) - 1."""
    gone = set(leaving)
    n_left = n_live - len(gone)
    holes = sorted(row for row in gone if row < n_left)
    tail = [row for row in range(n_left, n_live) if row not in gone]
    return Moves(source=tail, target=holes)
