"""Draft passes over known text: many mask groups per sequence, each as if it were decoded there alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.kv.attention import Scores, causal_attention


@dataclass(frozen=True, slots=True)
class PrefixPass:
    """Whole sequences, padded on the right; keeps the keys and values of the layers in `kept`."""

    kept: Collection[int]
    stored: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, new: tuple[Tensor, Tensor], scores: Scores) -> Tensor:
        """See ArenaPass; the batch is the sequences."""
        if layer in self.kept:
            self.stored[layer] = new
        return causal_attention(query, new, scores)


class GroupsPass:
    """Groups of a real token and the masks behind it, the same number for every sequence.

    A group sees the sequence before its real token, as the full model stored it, and its own earlier tokens. The batch
    is all groups of the first sequence, then all of the second.
    """

    def __init__(self, prefix: PrefixPass, starts: Tensor, n_masks: int) -> None:
        """starts: (sequences, groups), where each group's real token stands."""
        self.stored, self.starts, self.n_new = prefix.stored, starts, 1 + n_masks
        self._masks: dict[int | None, tuple[Tensor, Tensor]] = {}

    @property
    def positions(self) -> Tensor:
        """(sequences * groups, 1 + masks)."""
        return self.starts.flatten()[:, None] + torch.arange(self.n_new, device=self.starts.device)

    def attend(self, layer: int, query: Tensor, new: tuple[Tensor, Tensor], scores: Scores) -> Tensor:
        """See ArenaPass; one softmax spans the sequence and the group."""
        keys, values = self.stored[layer]
        n_sequences, n_kv_heads, n_tokens, head_dim = keys.shape
        grouped = (query * scores.scaling).reshape(query.shape[0], n_kv_heads, -1, head_dim)
        packed = self._pack(grouped, n_sequences)
        to_prefix = self._unpack(scores.of(packed, keys), query.shape[0])
        prefix_mask, own_mask = self._masks_of(scores.window, n_tokens)
        split = (query.shape[0], n_kv_heads, -1, self.n_new)
        seen_prefix = to_prefix.view(*split, n_tokens) + prefix_mask.to(query.dtype)
        seen_own = scores.of(grouped, new[0]).view(*split, self.n_new) + own_mask.to(query.dtype)
        weights = torch.softmax(torch.cat((seen_prefix, seen_own), dim=-1), dim=-1).flatten(2, 3)
        from_prefix = torch.matmul(self._pack(weights[..., :n_tokens], n_sequences), values)
        attended = self._unpack(from_prefix, query.shape[0]) + torch.matmul(weights[..., n_tokens:], new[1])
        return attended.view(query.shape)

    def _pack(self, per_group: Tensor, n_sequences: int) -> Tensor:
        """(sequences * groups, kv_heads, queries, x) -> (sequences, kv_heads, groups * queries, x)."""
        split = per_group.view(n_sequences, -1, *per_group.shape[1:])
        return split.transpose(1, 2).flatten(2, 3)

    def _unpack(self, packed: Tensor, n_rows: int) -> Tensor:
        """The way back."""
        n_sequences, n_kv_heads, _, size = packed.shape
        split = packed.view(n_sequences, n_kv_heads, n_rows // n_sequences, -1, size)
        return split.transpose(1, 2).reshape(n_rows, n_kv_heads, -1, size)

    def _masks_of(self, window: int | None, n_tokens: int) -> tuple[Tensor, Tensor]:
        """What is added to the scores, (groups of all sequences, 1, 1, new, tokens) and (new, new)."""
        if window not in self._masks:
            place = torch.arange(n_tokens, device=self.starts.device)
            ahead = torch.arange(self.n_new, device=self.starts.device)
            hidden_prefix = (place >= self.starts.flatten()[:, None, None]).expand(-1, self.n_new, -1)
            hidden_own = ahead > ahead[:, None]
            if window is not None:
                hidden_prefix = hidden_prefix | (place <= self.positions[:, :, None] - window)
                hidden_own = hidden_own | (ahead <= ahead[:, None] - window)
            self._masks[window] = _mask(hidden_prefix)[:, None, None], _mask(hidden_own)
        return self._masks[window]


def _mask(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)
