"""The two kinds of model calls on an arena: prompts as a whole, and a few tokens for every live row."""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.kv.arena import Arena
from runtime.kv.attention import Scores, causal_attention


@dataclass(frozen=True, slots=True)
class PrefillPass:
    """The tokens of whole prompts, padded on the right; what follows a prompt is hidden by its length."""

    arena: Arena
    prompts: slice  # their places in the arena

    def attend(self, layer: int, query: Tensor, new: tuple[Tensor, Tensor], scores: Scores) -> Tensor:
        """See ArenaPass; the batch is the prompts."""
        for memory, one in zip(self.arena.prompts[layer], new, strict=True):
            memory[self.prompts, :, : one.shape[2]] = one
        return causal_attention(query, new, scores)


Rows = slice | list[int]


class RowsPass:
    """The next tokens of live rows, each at its own position: one to decode, some to score or to verify.

    Each row attends to its prompt, whose keys are read once for all rows of the prompt, and to its own tokens; one
    softmax spans both.
    """

    def __init__(
        self, arena: Arena, n_new: int, n_longest: int, counts: Tensor | None = None, rows: Rows | None = None
    ) -> None:
        """Feed `n_new` tokens to each row; `n_longest` is at least what any row of the arena holds afterwards.

        counts: (rows,), how many of the new tokens are real where rows differ; the rest is padding. rows: some of the
        live rows, whose keys are copied unless they are a range; None means all. The caller advances
        `arena.row_tokens` afterwards.
        """
        arena.fit(n_longest)
        self.arena, self.n_new = arena, n_new
        self.rows = slice(0, arena.n_rows) if rows is None else rows
        self.layout = arena.layout(self.rows)
        device = arena.row_tokens.device
        if isinstance(self.rows, slice):
            self.places = torch.arange(self.rows.start, self.rows.stop, device=device)
        else:
            self.places = torch.tensor(self.rows, device=device)
        stored = arena.row_tokens[self.rows, None]
        ahead = torch.arange(n_new, device=stored.device)
        self.index = slots = stored + ahead  # (rows, new), place of each new token behind the prompt
        if counts is not None:
            # Padding repeats the place of the last real token, so that it sees something, and is stored out of sight.
            slots = slots.masked_fill(ahead >= counts[:, None], arena.n_slots - 1)
            self.index = torch.minimum(self.index, stored + counts[:, None] - 1)
        self.flat_slots = self._flat(slots)
        self._masks: dict[int | None, tuple[Tensor | None, Tensor]] = {}

    @property
    def positions(self) -> Tensor:
        """(rows, new), counted from the start of the prompt."""
        return self.index + self.arena.prompt_tokens[self.layout.owner][:, None]

    def attend(self, layer: int, query: Tensor, new: tuple[Tensor, Tensor], scores: Scores) -> Tensor:
        """See ArenaPass; the batch is the live rows."""
        arena, layout = self.arena, self.layout
        n_rows, n_heads, n_new, head_dim = query.shape
        n_kv_heads = arena.shape.n_kv_heads
        for memory, one in zip(arena.rows[layer], new, strict=True):
            memory.view(-1, head_dim).index_copy_(0, self.flat_slots, one.reshape(-1, head_dim))
        # The query heads of one key-value head act as its query tokens: no key or value is repeated in memory.
        grouped = (query * scores.scaling).reshape(n_rows, n_kv_heads, -1, head_dim)
        prompt_keys, prompt_values = arena.prompts[layer, :, : arena.n_prompts, :, : layout.n_longest]
        row_keys, row_values = arena.rows[layer][:, self.rows]
        to_prompt = self._ungroup(scores.of(self._group(grouped), prompt_keys))
        to_row = scores.of(grouped, row_keys)
        prompt_mask, row_mask = self._masks_of(scores.window)
        if prompt_mask is not None:
            to_prompt.view(n_rows, n_kv_heads, -1, n_new, layout.n_longest).add_(prompt_mask)
        to_row.view(n_rows, n_kv_heads, -1, n_new, arena.n_slots).add_(row_mask)
        both = torch.cat((to_prompt, to_row), dim=-1)
        weights = torch.softmax(both, dim=-1)  # which computes in float32 inside, whatever the number format
        attended = torch.matmul(weights[..., layout.n_longest :], row_values)
        attended += self._ungroup(torch.matmul(self._group(weights[..., : layout.n_longest]), prompt_values))
        return attended.view(n_rows, n_heads, n_new, head_dim)

    def _group(self, per_row: Tensor) -> Tensor:
        """(rows, kv_heads, queries, x) -> (prompts, kv_heads, width * queries, x)."""
        _, n_kv_heads, n_queries, size = per_row.shape
        placed = per_row if self.layout.members is None else per_row.index_select(0, self.layout.members)
        split = placed.view(self.arena.n_prompts, self.layout.n_width, n_kv_heads, n_queries, size)
        return split.transpose(1, 2).reshape(self.arena.n_prompts, n_kv_heads, -1, size)

    def _ungroup(self, per_prompt: Tensor) -> Tensor:
        """The way back."""
        n_prompts, n_kv_heads, _, size = per_prompt.shape
        split = per_prompt.view(n_prompts, n_kv_heads, self.layout.n_width, -1, size).transpose(1, 2)
        placed = split.reshape(n_prompts * self.layout.n_width, n_kv_heads, -1, size)
        return placed if self.layout.places is None else placed.index_select(0, self.layout.places)

    def _flat(self, slots: Tensor) -> Tensor:
        """Slots (rows, new) -> places of (row, kv head, new) among all slots of all rows and heads."""
        n_kv_heads, n_slots = self.arena.shape.n_kv_heads, self.arena.n_slots
        rows = self.places[:, None, None] * n_kv_heads
        heads = torch.arange(n_kv_heads, device=slots.device)[None, :, None]
        return ((rows + heads) * n_slots + slots[:, None]).flatten()

    def _masks_of(self, window: int | None) -> tuple[Tensor | None, Tensor]:
        """What is added to the scores, (rows, 1, 1, new, tokens of the longest prompt) and (rows, 1, 1, new, slots).

        None where every row sees the whole of its prompt.
        """
        if window not in self._masks:
            prompt_tokens = self.arena.prompt_tokens[self.layout.owner][:, None, None]  # (rows, 1, 1)
            in_prompt = torch.arange(self.layout.n_longest, device=self.index.device)
            in_row = torch.arange(self.arena.n_slots, device=self.index.device)
            query = self.index[:, :, None]  # (rows, new, 1), counted from the end of the prompt
            hidden_prompt = (in_prompt >= prompt_tokens).expand(-1, self.n_new, -1)
            hidden_row = in_row > query
            if window is not None:
                hidden_prompt = hidden_prompt | (in_prompt <= prompt_tokens + query - window)
                hidden_row = hidden_row | (in_row <= query - window)
            sees_all = window is None and self.layout.n_shortest == self.layout.n_longest
            self._masks[window] = None if sees_all else self._mask(hidden_prompt), self._mask(hidden_row)
        return self._masks[window]

    def _mask(self, hidden: Tensor) -> Tensor:
        mask = torch.zeros(hidden.shape, dtype=self.arena.prompts.dtype, device=hidden.device)
        return mask.masked_fill_(hidden, -torch.inf)[:, None, None]
