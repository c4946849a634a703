"""A plain function as reward: checkers, rules, unit tests of answers."""

from collections.abc import Callable, Sequence

from runtime.records import Prompt
from runtime.rewards.protocol import RescoringSession, RewardSession, Score


class FunctionReward:
    """Scores each answer with `fn(prompt, response)`; an exception is that row's error."""

    def __init__(self, fn: Callable[[Prompt, str], float], name: str) -> None:
        self.fn, self.name = fn, name

    @property
    def kv_bytes_per_token(self) -> int:
        """See Reward."""
        return 0

    def start(self, prompts: Sequence[Prompt]) -> RewardSession:
        """See Reward."""
        return RescoringSession(self, prompts)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Score]:
        """See Reward."""
        return [self._score_one(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]

    def _score_one(self, prompt: Prompt, response: str) -> Score:
        try:
            return Score.of(float(self.fn(prompt, response)))
        except Exception as error:  # any failure of the user's function belongs to this row only
            return Score(None, f"{self.name} failed: {type(error).__name__}: {error}")
