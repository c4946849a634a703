"""The records that cross the border of `runtime/`: prompts in, candidates out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

# A skipped candidate was never drawn, because its prompt had good ones enough.
FinishReason = Literal["eos", "stop", "length", "cut", "skipped", "error"]
FINISHED: tuple[FinishReason, ...] = ("eos", "stop", "length")
Status = Literal["ok", "error"]
Progress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that waits for an answer, and the group that asks."""

    prompt_id: str
    messages: tuple[Message, ...]
    group: str
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """One cut a candidate took part in: the score of its first `n_tokens` tokens and whether it stayed."""

    n_tokens: int
    score: float
    kept: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """One sampled answer. `token_ids` include the end token or stop string that ended it; `response` does not."""

    prompt_id: str
    candidate_index: int
    token_ids: tuple[int, ...]
    response: str
    finish_reason: FinishReason
    cut_at_token: int | None = None
    cuts: tuple[Cut, ...] = ()
    status: Status = "ok"
    error: str | None = None

    @property
    def n_tokens(self) -> int:
        """Number of sampled tokens."""
        return len(self.token_ids)
