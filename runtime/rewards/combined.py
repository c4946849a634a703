"""A weighted sum of rewards."""

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.errors import ConfigError
from runtime.records import Prompt
from runtime.rewards.protocol import Reward, RewardSession, Score


class CombinedReward:
    """`sum(weight * reward)`; an answer that one of them cannot score has no sum either."""

    def __init__(self, parts: Sequence[tuple[float, Reward]]) -> None:
        if not parts:
            raise ConfigError("a combined reward needs at least one part")
        self.parts = tuple(parts)
        self.name = "combined"

    @property
    def kv_bytes_per_token(self) -> int:
        """See Reward."""
        return sum(reward.kv_bytes_per_token for _, reward in self.parts)

    def start(self, prompts: Sequence[Prompt]) -> RewardSession:
        """See Reward."""
        return CombinedSession([(weight, reward.start(prompts)) for weight, reward in self.parts])

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Score]:
        """See Reward."""
        return _sums([(weight, reward.score(prompts, responses)) for weight, reward in self.parts])


@dataclass(frozen=True, slots=True)
class CombinedSession:
    """The sessions of all parts."""

    parts: Sequence[tuple[float, RewardSession]]

    def extend(self, rows: Sequence[int], token_ids: Sequence[Sequence[int]], texts: Sequence[str]) -> None:
        """See RewardSession."""
        for _, session in self.parts:
            session.extend(rows, token_ids, texts)

    def scores(self, rows: Sequence[int]) -> list[Score]:
        """See RewardSession."""
        return _sums([(weight, session.scores(rows)) for weight, session in self.parts])

    def keep(self, rows: Sequence[int]) -> None:
        """See RewardSession."""
        for _, session in self.parts:
            session.keep(rows)


def _sums(parts: Sequence[tuple[float, Sequence[Score]]]) -> list[Score]:
    sums: list[Score] = []
    for row in zip(*(scores for _, scores in parts), strict=True):
        errors = [score.error for score in row if score.value is None]
        total = sum(weight * (score.value or 0.0) for (weight, _), score in zip(parts, row, strict=True))
        sums.append(Score(None, errors[0]) if errors else Score.of(total))
    return sums
