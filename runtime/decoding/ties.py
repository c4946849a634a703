"""Draws so close that rounding decides them, drawn again in one way that does not depend on what was computed beside.

How many rows and tokens share a pass changes the last bits of its logits. Where the winner of a draw is ahead by less
than that, its row's whole text goes through the model alone, and that pass decides. So a text is the same for any
number of rows and any number of drafts, also where these follow from measured times.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from runtime.decoding.rows import RowTable
from runtime.decoding.sampling import SamplingConfig, penalise, sample

# Leads that rounding could turn round, in units of `sample_with_lead`: ten times the largest difference that was met
# (docs/s3d.md). bfloat16 has too many of them, and asking a GPU after every step would make it wait.
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-12}


class Ties:
    """Settles the close draws of one policy."""

    def __init__(self, model: PreTrainedModel, sampling: SamplingConfig) -> None:
        self.model, self.sampling = model, sampling
        self.tolerance = TOLERANCES.get(model.dtype) if model.device.type == "cpu" else None

    def settle(self, rows: RowTable, index: Tensor, tokens: Tensor, lead: Tensor) -> None:
        """Decide in place the close ones of one token per row: index, tokens and lead are (rows,)."""
        for place in self._close(lead):
            row = int(index[place])
            tokens[place] = self._alone(rows, row, [])

    def settle_blocks(self, rows: RowTable, index: Tensor, tokens: Tensor, lead: Tensor, counts: Tensor) -> None:
        """Likewise with blocks: tokens and lead (rows, at most), of which the first counts (rows,) are kept.

        A block ends behind a token that was decided otherwise: what follows was drawn for another text.
        """
        kept = torch.arange(tokens.shape[1]) < counts[:, None]
        for place in self._close(lead.masked_fill(~kept, torch.inf).amin(dim=1)):
            row, n_kept = int(index[place]), int(counts[place])
            for ahead in range(n_kept):
                if not float(lead[place, ahead]) < (self.tolerance or 0):
                    continue
                drawn = self._alone(rows, row, tokens[place, :ahead].tolist())
                if drawn != int(tokens[place, ahead]):
                    tokens[place, ahead], counts[place] = drawn, ahead + 1
                    break

    def _close(self, lead: Tensor) -> list[int]:
        if self.tolerance is None:
            return []
        close: list[int] = (lead < self.tolerance).nonzero()[:, 0].tolist()
        return close

    def _alone(self, rows: RowTable, row: int, ahead: list[int]) -> int:
        """The token of `row` behind its own ones and those `ahead`, by a pass over its text and nothing else."""
        n_sampled = int(rows.n_sampled[row])
        token_ids = [*rows.owners[row].job.prompt_ids, *rows.tokens[row, :n_sampled].tolist(), *ahead]
        text = torch.tensor([token_ids]).clamp(min=0)  # what is not finite is refused later
        logits = self.model(input_ids=text, use_cache=False, logits_to_keep=1).logits[:, -1]
        if self.sampling.repetition_penalty != 1:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            seen[0, text[0]] = True
            logits = penalise(logits, seen, self.sampling.repetition_penalty)
        position = torch.tensor([n_sampled + len(ahead)])
        return int(sample(logits, rows.keys[row : row + 1], position, self.sampling))
