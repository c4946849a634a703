"""What is known about each live row besides its keys and values: owner, random key, tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.decoding.arena import Moves
from runtime.decoding.scheduler import Job
from runtime.randomness import row_key


@dataclass(frozen=True, slots=True)
class Owner:
    """The candidate a row belongs to."""

    job: Job
    candidate_index: int


class RowTable:
    """Per-row state next to the arena; row i here is row i there. Tensors are (max rows, ...)."""

    def __init__(self, max_rows: int, max_new_tokens: int, device: torch.device) -> None:
        self.owners: list[Owner] = []
        self.keys = torch.zeros(max_rows, dtype=torch.long, device=device)
        self.lengths = torch.zeros(max_rows, dtype=torch.long, device=device)  # tokens stored in the arena
        self.n_sampled = torch.zeros(max_rows, dtype=torch.long, device=device)
        self.last = torch.zeros(max_rows, dtype=torch.long, device=device)
        self.tokens = torch.zeros(max_rows, max_new_tokens, dtype=torch.long, device=device)

    def add(self, job: Job, rows: slice, seed: int) -> None:
        """Give `rows`, which must be the next free ones, to the candidates of `job`."""
        n = rows.stop - rows.start
        self.owners += [Owner(job, index) for index in range(n)]
        keys = [row_key(seed, job.prompt.prompt_id, index) for index in range(n)]
        self.keys[rows] = torch.tensor(keys, device=self.keys.device)
        self.lengths[rows] = len(job.prompt_ids)
        self.n_sampled[rows] = 0

    def append(self, rows: slice, tokens: Tensor) -> None:
        """Record one sampled token for each row of `rows`."""
        index = torch.arange(rows.start, rows.stop, device=tokens.device)
        self.tokens[index, self.n_sampled[rows]] = tokens
        self.last[rows] = tokens
        self.n_sampled[rows] += 1

    def sampled(self, row: int) -> list[int]:
        """Token ids that `row` has sampled."""
        ids: list[int] = self.tokens[row, : int(self.n_sampled[row])].tolist()
        return ids

    def longest(self, n_live: int) -> int:
        """Slots in use by the longest of the live rows."""
        return int(self.lengths[:n_live].max())

    def apply(self, moves: Moves) -> None:
        """Follow the arena's compaction."""
        for source, target in zip(moves.source, moves.target, strict=True):
            self.owners[target] = self.owners[source]
        if moves.source:
            for column in (self.keys, self.lengths, self.n_sampled, self.last, self.tokens):
                column[moves.target] = column[moves.source]

    def shrink(self, n_live: int) -> None:
        """Drop the owners behind the last live row."""
        del self.owners[n_live:]
