"""The memory of a decoding run: preallocated keys and values, each prompt's once, each row's private tokens apart.

Rows 0 to n_rows - 1 and prompts 0 to n_prompts - 1 are in use; whoever leaves is replaced in place by the last one.
A row's token i after its prompt lies in slot i of that row. Rows have as many slots as the longest needs by now, so
that what is read lies together; the same memory is laid out anew when they need more.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

SLOT_STEP = 32  # slots that rows gain at once


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token of one row holds: keys and values of every layer."""

    n_layers: int
    n_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "KVShape":
        """The shape that `model` needs."""
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, config.num_key_value_heads, head_dim)

    def n_bytes(self, n_tokens: int, dtype: torch.dtype) -> int:
        """Bytes of so many tokens."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * n_tokens * dtype.itemsize


@dataclass(frozen=True, slots=True)
class ArenaSize:
    """How many prompts and rows an arena has room for, and how many tokens each of them.

    `row_slots` counts one slot more than a row has tokens, see Arena. `row_tokens` bounds rows times slots where rows
    may be many as long as they are short.
    """

    n_prompts: int
    prompt_slots: int
    n_rows: int
    row_slots: int
    row_tokens: int | None = None

    @property
    def n_row_tokens(self) -> int:
        """Tokens of all rows."""
        return self.n_rows * self.row_slots if self.row_tokens is None else self.row_tokens

    @property
    def n_tokens(self) -> int:
        """Tokens in all."""
        return self.n_prompts * self.prompt_slots + self.n_row_tokens


class Arena:
    """Keys and values of all live prompts and rows.

    prompts: (layers, 2, prompts, kv_heads, prompt slots, head_dim); rows: per layer (2, rows, kv_heads, slots,
    head_dim). The last slot of a row takes what ragged passes pad with, and is never attended to.
    """

    def __init__(self, shape: KVShape, size: ArenaSize, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.size = shape, size
        # Zeros, not empty: masked slots are multiplied by weight 0, and 0 * NaN would be NaN.
        self.prompts = torch.zeros(
            (shape.n_layers, 2, size.n_prompts, shape.n_kv_heads, size.prompt_slots, shape.head_dim),
            dtype=dtype,
            device=device,
        )
        self._row_memory = [self._new_layer() for _ in range(shape.n_layers)]
        self.n_slots = self._slots_for(0)  # of every row by now, the last one included that holds no token
        self.rows = self._views()
        self.prompt_tokens = torch.zeros(size.n_prompts, dtype=torch.long, device=device)  # (prompts,)
        self.row_tokens = torch.zeros(size.n_rows, dtype=torch.long, device=device)  # (rows,), without the prompt
        self.owners: list[int] = []  # the prompt of each row
        self.n_prompts = 0
        self.prompt_lengths: list[int] = []  # prompt_tokens, known without asking the device
        self._layout: Layout | None = None

    @property
    def n_rows(self) -> int:
        """Rows in use."""
        return len(self.owners)

    @property
    def n_free_rows(self) -> int:
        """Rows that a new prompt can take."""
        return self.rows[0].shape[1] - self.n_rows

    @property
    def n_free_prompts(self) -> int:
        """Prompts that can still be added."""
        return self.size.n_prompts - self.n_prompts

    @property
    def n_bytes(self) -> int:
        """Bytes of keys and values, used or not."""
        return self.prompts.nbytes + sum(layer.nbytes for layer in self._row_memory)

    def fit(self, n_tokens: int) -> None:
        """Give every row slots for `n_tokens` tokens; fewer than it had when it needs less than half of them."""
        wanted = self._slots_for(n_tokens)
        assert n_tokens < wanted, (n_tokens, self.size)
        if self.n_slots / 2 < wanted <= self.n_slots:
            return
        old, n_kept = self.rows, min(self.n_slots, wanted)
        self.n_slots = wanted
        self.rows = self._views()
        # Both lie in the same memory: what moves is copied aside, one layer at a time.
        for old_layer, layer in zip(old, self.rows, strict=True):
            kept = old_layer[:, : self.n_rows, :, :n_kept].clone()
            layer[:, : self.n_rows, :, n_kept:] = 0
            layer[:, : self.n_rows, :, :n_kept] = kept

    def resize(self, n_rows: int, row_slots: int) -> None:
        """Other bounds, which what is live must fit; memory moves one layer at a time, so that both never coexist."""
        old, n_kept = self.rows, min(self.n_slots, row_slots)
        self.size = replace(self.size, n_rows=n_rows, row_slots=row_slots, row_tokens=None)
        self.n_slots = self._slots_for(n_kept - 1)
        self.rows = []
        for index in range(self.shape.n_layers):
            self._row_memory[index] = self._new_layer()
            layer = self._view(self._row_memory[index])
            layer[:, : self.n_rows, :, :n_kept] = old[index][:, : self.n_rows, :, :n_kept]
            old[index] = layer[:0]
            self.rows.append(layer)
        self.row_tokens = torch.nn.functional.pad(self.row_tokens[: self.n_rows], (0, n_rows - self.n_rows))

    def n_rows_with(self, n_tokens: int) -> int:
        """How many rows there is room for when each holds up to `n_tokens` tokens."""
        return min(self.size.n_rows, self.size.n_row_tokens // self._slots_for(n_tokens))

    def full_at(self, n_rows: int, n_tokens: int) -> int:
        """How many tokens above `n_tokens` are too many for `n_rows` rows."""
        while n_tokens < self.size.row_slots:
            n_tokens = self._slots_for(n_tokens)
            if n_rows > self.n_rows_with(n_tokens):
                break
        return n_tokens

    def _slots_for(self, n_tokens: int) -> int:
        return min(-(-(n_tokens + 1) // SLOT_STEP) * SLOT_STEP, self.size.row_slots)

    def _new_layer(self) -> Tensor:
        n_numbers = self.size.n_row_tokens * self.shape.n_kv_heads * self.shape.head_dim
        return torch.zeros((2, n_numbers), dtype=self.prompts.dtype, device=self.prompts.device)

    def _views(self) -> list[Tensor]:
        return [self._view(layer) for layer in self._row_memory]

    def _view(self, layer: Tensor) -> Tensor:
        shape, n_rows = self.shape, min(self.size.n_rows, self.size.n_row_tokens // self.n_slots)
        used = layer[:, : n_rows * self.n_slots * shape.n_kv_heads * shape.head_dim]
        return used.view(2, n_rows, shape.n_kv_heads, self.n_slots, shape.head_dim)

    def add(self, n_prompt_tokens: int, n_rows: int) -> slice:
        """Take the next prompt and its rows, which are empty; the rows."""
        assert n_rows <= self.n_free_rows and self.n_free_prompts and n_prompt_tokens <= self.size.prompt_slots
        rows = slice(self.n_rows, self.n_rows + n_rows)
        self.prompt_tokens[self.n_prompts] = n_prompt_tokens
        self.prompt_lengths.append(n_prompt_tokens)
        self.row_tokens[rows] = 0
        self.owners += [self.n_prompts] * n_rows
        self.n_prompts += 1
        self._layout = None
        return rows

    def release(self, leaving: Collection[int], n_slots: int) -> "Moves":
        """Free rows and close the holes with the last live rows; at most one row copy per freed row.

        A prompt without rows leaves too. n_slots: how many slots of the moved rows hold something. Apply the returned
        moves to anything kept per row.
        """
        moves = plan_moves(self.n_rows, leaving)
        n_left = self.n_rows - len(set(leaving))
        if moves.source:
            for layer in self.rows:
                layer[:, moves.target, :, :n_slots] = layer[:, moves.source, :, :n_slots]
            self.row_tokens[moves.target] = self.row_tokens[moves.source]
            for source, target in zip(moves.source, moves.target, strict=True):
                self.owners[target] = self.owners[source]
        del self.owners[n_left:]
        if not self.owners:  # the next rows are short, and there may be more of them
            self.n_slots = self._slots_for(0)
            self.rows = self._views()
        self._release_prompts()
        self._layout = None
        return moves

    def _release_prompts(self) -> None:
        moves = plan_moves(self.n_prompts, set(range(self.n_prompts)) - set(self.owners))
        for source, target in zip(moves.source, moves.target, strict=True):
            n_tokens = self.prompt_lengths[source]
            self.prompts[:, :, target, :, :n_tokens] = self.prompts[:, :, source, :, :n_tokens]
            self.prompt_lengths[target] = n_tokens
        if moves.source:
            self.prompt_tokens[moves.target] = self.prompt_tokens[moves.source]
        new_place = dict(zip(moves.source, moves.target, strict=True))
        self.owners = [new_place.get(owner, owner) for owner in self.owners]
        self.n_prompts = len(set(self.owners))
        del self.prompt_lengths[self.n_prompts :]

    def layout(self, rows: slice | list[int]) -> "Layout":
        """Which of the rows belong to which prompt, as indices; for all rows made anew only when some came or went."""
        if rows != slice(0, self.n_rows):
            owners = self.owners[rows] if isinstance(rows, slice) else [self.owners[row] for row in rows]
            return Layout.of(owners, self.prompt_lengths, self.prompts.device)
        if self._layout is None:
            self._layout = Layout.of(self.owners, self.prompt_lengths, self.prompts.device)
        return self._layout


@dataclass(frozen=True, slots=True)
class Layout:
    """The rows grouped by prompt, padded, so that a prompt's keys are read once for all of its rows."""

    n_shortest: int  # tokens of the shortest live prompt
    n_longest: int  # tokens of the longest live prompt
    n_width: int  # rows of the prompt that has most
    owner: Tensor  # (rows,), the prompt of each row
    members: Tensor | None  # (prompts * width,), row of each place, padded with 0; None where place i is row i
    places: Tensor | None  # (rows,), place of each row

    @classmethod
    def of(cls, owners: list[int], prompt_lengths: list[int], device: torch.device) -> "Layout":
        """The layout of rows with these owners."""
        rows_of: list[list[int]] = [[] for _ in prompt_lengths]
        for row, owner in enumerate(owners):
            rows_of[owner].append(row)
        bounds = min(prompt_lengths), max(prompt_lengths)
        width = max(len(rows) for rows in rows_of)
        padded = [row for rows in rows_of for row in rows + [0] * (width - len(rows))]
        owner_of = torch.tensor(owners, device=device)
        if padded == list(range(len(owners))):
            return cls(*bounds, width, owner_of, None, None)
        place_of = {row: i * width + j for i, rows in enumerate(rows_of) for j, row in enumerate(rows)}
        places = torch.tensor([place_of[row] for row in range(len(owners))], device=device)
        return cls(*bounds, width, owner_of, torch.tensor(padded, device=device), places)


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
