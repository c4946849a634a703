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

    def __init__(self, max_rows: int, max_new_tokens: int, n_vocabulary: int, device: torch.device) -> None:
        """n_vocabulary: size of the vocabulary where seen tokens matter, else 0."""
        self.owners: list[Owner] = []
        self.keys = torch.zeros(max_rows, dtype=torch.long, device=device)
        self.n_sampled = torch.zeros(max_rows, dtype=torch.long, device=device)
        self.last = torch.zeros(max_rows, dtype=torch.long, device=device)
        self.tokens = torch.zeros(max_rows, max_new_tokens, dtype=torch.long, device=device)
        self.seen = torch.zeros(max_rows, n_vocabulary, dtype=torch.bool, device=device)  # in prompt or answer

    def add(self, job: Job, rows: slice, seed: int) -> None:
        """Give `rows`, which must be the next free ones, to the wave of `job`."""
        assert rows.stop - rows.start == len(job.wave)
        self.owners += [Owner(job, index) for index in job.wave]
        keys = [row_key(seed, job.prompt.prompt_id, index) for index in job.wave]
        self.keys[rows] = torch.tensor(keys, device=self.keys.device)
        self.n_sampled[rows] = 0
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

    def newest(self, n_live: int, n_steps: int) -> Tensor:
        """The tokens of the last `n_steps` steps, (rows, steps)."""
        ahead = torch.arange(-n_steps, 0, device=self.tokens.device)
        return self.tokens[:n_live].gather(1, self.n_sampled[:n_live, None] + ahead)

    def sampled(self, row: int) -> list[int]:
        """Token ids that `row` has sampled."""
        ids: list[int] = self.tokens[row, : int(self.n_sampled[row])].tolist()
        return ids

    def apply(self, moves: Moves) -> None:
        """Follow the arena's compaction."""
        for source, target in zip(moves.source, moves.target, strict=True):
            self.owners[target] = self.owners[source]
        if moves.source:
            for column in (self.keys, self.n_sampled, self.last, self.tokens, self.seen):
                column[moves.target] = column[moves.source]

    def shrink(self, n_live: int) -> None:
        """Drop the owners behind the last live row."""
        del self.owners[n_live:]
