"""How large the arena of a run is, and whether a prompt fits into the memory it is given."""

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.decoding.sampling import SamplingConfig
from runtime.errors import InputError
from runtime.kv.arena import SLOT_STEP, ArenaSize

CLOSING_TOKENS = 8  # of the reward's chat template behind an answer, at most about so many


@dataclass(frozen=True, slots=True)
class Costs:
    """What a run keeps in memory per prompt and row: the policy's keys and values and those of the reward model."""

    sampling: SamplingConfig
    n_survivors: int  # rows of a prompt behind its last cut
    bytes_per_token: int
    reward_bytes_per_token: int
    n_reward_tokens: int  # of an answer, at the last cut
    budget: int | None  # bytes

    def prompt_bytes(self, n_tokens: int) -> int:
        """Of a prompt without its rows."""
        return n_tokens * (self.bytes_per_token + self.reward_bytes_per_token)

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        reward = (self.n_reward_tokens + CLOSING_TOKENS) * self.reward_bytes_per_token
        return self._row_slots * self.bytes_per_token + reward

    @property
    def _row_slots(self) -> int:
        return self.sampling.max_new_tokens + 1

    def bytes(self, n_prompt_tokens: int) -> int:
        """Least of a prompt with its rows."""
        return self.prompt_bytes(n_prompt_tokens) + self.sampling.n * self.row_bytes

    def check(self, n_prompt_tokens: int) -> None:
        """InputError when not even this prompt alone fits."""
        needed = self.bytes(n_prompt_tokens)
        if self.budget is not None and needed > self.budget:
            raise InputError(
                f"prompt of {n_prompt_tokens} tokens with n = {self.sampling.n} and max_new_tokens = "
                f"{self.sampling.max_new_tokens} needs {needed / 1e6:.1f} MB of keys and values, the budget is "
                f"{self.budget / 1e6:.1f} MB; raise kv_budget_mb or lower one of them"
            )

    def plan(self, lengths: Sequence[int], max_rows: int) -> ArenaSize:
        """Room for prompts of `lengths` tokens, each of which passes `check`.

        As many rows as allowed and useful, in whole prompts where memory is short; and as many prompts as keep the
        rows full behind the last cut.
        """
        longest, n = max(lengths, default=0), self.sampling.n
        n_rows = min(max_rows, n * len(lengths))
        n_prompts = min(len(lengths), -(-n_rows // self.n_survivors))
        if self.budget is not None and lengths:
            per_prompt = self.prompt_bytes(longest)
            n_whole = self.budget // (per_prompt + n * self.row_bytes)
            n_rows = min(n_rows, n * n_whole)
            n_prompts = min(n_prompts, (self.budget - n_rows * self.row_bytes) // per_prompt)
        return ArenaSize(n_prompts, longest, n_rows, self._row_slots)


class ElasticCosts(Costs):
    """Of a run whose rows are cut when memory is full: many while they are short, few when they are long."""

    def bytes(self, n_prompt_tokens: int) -> int:
        """See Costs: all rows short, or one of them whole."""
        n_least = max(self.sampling.n * min(SLOT_STEP, self._row_slots), self._row_slots)
        return self.prompt_bytes(n_prompt_tokens) + n_least * self.bytes_per_token

    def plan(self, lengths: Sequence[int], max_rows: int) -> ArenaSize:
        """See Costs: one prompt at a time, with as many tokens of rows as the budget leaves."""
        assert self.budget is not None
        if not lengths:
            return ArenaSize(0, 0, 0, self._row_slots)
        n, longest = self.sampling.n, max(lengths)
        n_tokens = min(n * self._row_slots, (self.budget - self.prompt_bytes(longest)) // self.bytes_per_token)
        return ArenaSize(1, longest, n, self._row_slots, n_tokens)
