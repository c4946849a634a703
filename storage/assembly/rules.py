"""What a user may ask of the pairs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Strategy = Literal["best_vs_worst", "best_vs_random", "best_vs_second", "all_pairs", "top_k_vs_bottom_k"]
Truncated = Literal["keep", "drop", "penalise"]
Normalisation = Literal["none", "zscore"]
Balance = Literal["none", "smallest"]


@dataclass(frozen=True, slots=True)
class AnswerRules:
    """Which answers take part, and at what score. Token counts are inclusive; None: no bound.

    truncated: what happens to answers that ended at max_new_tokens. normalisation: `zscore` makes the mean of a group's
    scores 0 and their standard deviation 1, so that one margin means the same in every group.
    """

    min_tokens: int | None = None
    max_tokens: int | None = None
    truncated: Truncated = "keep"
    truncation_penalty: float = 0.0
    normalisation: Normalisation = "none"


@dataclass(frozen=True, slots=True)
class PairRules:
    """Which pairs are made. A pair needs a margin above `min_margin`; ties never pair.

    top_k: how many of the best meet as many of the worst (top_k_vs_bottom_k). test_share: share of the prompts whose
    pairs go to the split `test`.
    """

    strategy: Strategy = "best_vs_worst"
    min_margin: float = 0.0
    top_k: int = 1
    max_pairs_per_prompt: int | None = None
    test_share: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GroupRules:
    """How many pairs a group may and must have.

    max_pairs holds for every group, quotas for those they name instead; `smallest` cuts all groups down to the one
    that has fewest.
    """

    max_pairs: int | None = None
    min_pairs: int = 0
    quotas: Mapping[str, int] = field(default_factory=dict)
    balance: Balance = "none"


@dataclass(frozen=True, slots=True)
class AssemblyRules:
    """All of it."""

    answers: AnswerRules = AnswerRules()
    pairs: PairRules = PairRules()
    groups: GroupRules = GroupRules()
