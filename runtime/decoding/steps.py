"""How live rows get their next tokens: what a decoding run holds, and the plain way of one token for every row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from runtime.decoding.rows import RowTable
from runtime.decoding.sampling import SamplingConfig, penalise, sample, sample_with_lead
from runtime.decoding.ties import Ties
from runtime.kv.arena import Arena
from runtime.kv.attention import logits_of, run
from runtime.kv.passes import RowsPass


@dataclass(frozen=True, slots=True)
class State:
    """The policy, its live rows and their memory."""

    model: PreTrainedModel
    sampling: SamplingConfig
    arena: Arena
    rows: RowTable
    ties: Ties

    def sample(self, rows: slice, logits: Tensor) -> None:
        """The next token of `rows`."""
        if self.sampling.repetition_penalty != 1:
            logits = penalise(logits, self.rows.seen[rows], self.sampling.repetition_penalty)
        keys, position = self.rows.keys[rows], self.rows.n_sampled[rows]
        if self.ties.tolerance is None:
            tokens = sample(logits, keys, position, self.sampling)
        else:
            tokens, lead = sample_with_lead(logits, keys, position, self.sampling)
            self.ties.settle(self.rows, torch.arange(rows.start, rows.stop), tokens, lead)
        self.rows.append(rows, tokens)


class Steps(Protocol):
    """A way to go on."""

    @property
    def n_spare(self) -> int:
        """Tokens that it may sample for a row beyond those that are kept."""
        ...

    def advance(self, state: State, rooms: Sequence[int]) -> int:
        """Append tokens, at most `rooms[i]` to row i and one at least to some row; at most how many a row got."""
        ...


@dataclass(frozen=True, slots=True)
class PlainSteps:
    """One token for every row, some times in a row; nobody may be without room."""

    most: int  # steps at once
    n_spare: int = 0

    @torch.inference_mode()
    def advance(self, state: State, rooms: Sequence[int]) -> int:
        """See Steps."""
        n_steps, longest = min(self.most, *rooms), max(state.rows.lengths)
        for step in range(n_steps):
            _step(state, longest + step)
        return n_steps


def _step(state: State, n_longest: int) -> None:
    live = slice(0, state.arena.n_rows)
    one = RowsPass(state.arena, 1, n_longest)
    hidden = run(state.model, state.rows.last[live, None], one.positions, one)
    state.arena.row_tokens[live] += 1
    state.sample(live, logits_of(state.model, hidden[:, 0]))
