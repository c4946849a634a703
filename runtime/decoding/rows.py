"""What is known about each live row besides its keys and values: owner, random key, tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.decoding.scheduler import Job
from runtime.kv.arena import Moves
from runtime.randomness import row_key


@dataclass(frozen=True, slots=True)
class Owner:
    """The candidate a row belongs to."""

    job: Job
    candidate_index: int


class RowTable:
    """Per-row state next to the arena; row i here is row i there. Tensors are (max rows, ...)."""

    def __init__(self, max_rows: int, n_tokens: int, n_vocabulary: int, device: torch.device) -> None:
        """n_tokens: places of a row, those for what is not kept included. n_vocabulary: size of the vocabulary where
        seen tokens matter, else 0."""
        self.owners: list[Owner] = []
        self.lengths: list[int] = []  # n_sampled when the host last looked
        self.keys = torch.zeros(max_rows, dtype=torch.long, device=device)
        self.n_sampled = torch.zeros(max_rows, dtype=torch.long, device=device)
        self.n_settled = torch.zeros(max_rows, dtype=torch.long, device=device)  # lengths, on the device
        self.last = torch.zeros(max_rows, dtype=torch.long, device=device)
        self.tokens = torch.zeros(max_rows, n_tokens, dtype=torch.long, device=device)
        self.seen = torch.zeros(max_rows, n_vocabulary, dtype=torch.bool, device=device)  # in prompt or answer

    def add(self, job: Job, rows: slice, seed: int) -> None:
        """Give `rows`, which must be the next free ones, to the wave of `job`."""
        assert rows.stop - rows.start == len(job.wave)
        self.owners += [Owner(job, index) for index in job.wave]
        keys = [row_key(seed, job.prompt.prompt_id, index) for index in job.wave]
        self.keys[rows] = torch.tensor(keys, device=self.keys.device)
        self.lengths += [0] * len(job.wave)
        self.n_sampled[rows] = self.n_settled[rows] = 0
        if self.seen.shape[1]:
            self.seen[rows] = False
            self.seen[rows, job.prompt_ids] = True

    def append(self, rows: slice, tokens: Tensor) -> None:
        """Record one sampled token for each row of `rows`."""
        index = torch.arange(rows.start, rows.stop, device=tokens.device)
        self.tokens[index, self.n_sampled[rows]] = tokens
        self.last[rows] = tokens.clamp(min=0)
        if self.seen.shape[1]:
            self.seen[index, tokens.clamp(min=0)] = True
        self.n_sampled[rows] += 1

    def append_blocks(self, index: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """Record the first `counts[i]` of `tokens[i]` for row `index[i]`; (rows,), (rows, at most) and (rows,)."""
        n_most = tokens.shape[1]
        ahead = torch.arange(n_most, device=tokens.device)
        before = self.n_sampled[index]
        # What is not kept lies behind the end, where it is never read and soon written over.
        self.tokens[index[:, None], before[:, None] + ahead] = tokens
        self.n_sampled[index] = before + counts
        self.last[index] = self.tokens[index, before + counts - 1].clamp(min=0)
        if self.seen.shape[1]:
            for place in range(n_most):
                self.seen[index, tokens[:, place].clamp(min=0)] |= place < counts

    def newest(self, n_live: int, n_most: int) -> tuple[Tensor, Tensor]:
        """The tokens since the host last looked, at most `n_most` of each row, (rows, most), and which of them are."""
        ahead = torch.arange(n_most, device=self.tokens.device)
        start = self.n_settled[:n_live]
        return self.tokens[:n_live].gather(1, start[:, None] + ahead), ahead < (self.n_sampled[:n_live] - start)[
            :, None
        ]

    def sampled(self, row: int) -> list[int]:
        """Token ids that `row` had sampled when the host last looked."""
        ids: list[int] = self.tokens[row, : self.lengths[row]].tolist()
        return ids

    def settle(self, lengths: list[int]) -> None:
        """The host has looked: row i has `lengths[i]` tokens, and what was sampled behind them is dropped."""
        self.lengths = lengths
        self.n_sampled[: len(lengths)] = self.n_settled[: len(lengths)] = torch.tensor(
            lengths, device=self.tokens.device
        )

    def apply(self, moves: Moves) -> None:
        """Follow the arena's compaction."""
        for source, target in zip(moves.source, moves.target, strict=True):
            self.owners[target], self.lengths[target] = self.owners[source], self.lengths[source]
        if moves.source:
            for column in (self.keys, self.n_sampled, self.n_settled, self.last, self.tokens, self.seen):
                column[moves.target] = column[moves.source]

    def shrink(self, n_live: int) -> None:
        """Drop the owners behind the last live row."""
        del self.owners[n_live:], self.lengths[n_live:]
