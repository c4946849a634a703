"""Parameters of `assemble`."""

import re
from typing import Literal

from pydantic import Field, field_validator

from tasks.settings_base import StageConfig

Strategy = Literal["best_vs_worst", "best_vs_random", "best_vs_second", "all_pairs", "top_k_vs_bottom_k"]


class AssembleConfig(StageConfig):
    """Which pairs are made from scored candidates."""

    candidates: str = Field("", title="Candidates", description="REF of scored ones; empty: candidates/NAME, latest")
    strategy: Strategy = Field(
        "best_vs_worst",
        title="Strategy",
        description="Which finished answers meet; all_pairs: each with every worse one; top_k_vs_bottom_k: best with "
        "worst, second best with second worst, and so on",
    )
    min_margin: float = Field(0.0, title="Margin", description="A pair's score margin must be above this", ge=0)
    top_k: int = Field(2, title="Top-k", description="How many of the best are paired (top_k_vs_bottom_k)", ge=1)
    max_pairs_per_prompt: int | None = Field(
        None, title="Pairs per prompt", description="At most so many, chosen by a hash of the seed (all_pairs)", ge=1
    )
    normalisation: Literal["none", "zscore"] = Field(
        "none", title="Normalisation", description="zscore: scores of every group get mean 0 and standard deviation 1"
    )
    truncated: Literal["keep", "drop", "penalise"] = Field(
        "keep", title="Truncated answers", description="What to do with answers that ended at max_new_tokens"
    )
    truncation_penalty: float = Field(
        0.0, title="Penalty", description="Taken off the score of truncated answers (truncated = penalise)", ge=0
    )
    min_tokens: int | None = Field(None, title="Shortest answer", description="Tokens; shorter ones are not used", ge=1)
    max_tokens: int | None = Field(None, title="Longest answer", description="Tokens; longer ones are not used", ge=1)
    near_duplicates: float | None = Field(
        None,
        title="Near duplicates",
        description="Prompts whose similarity (Jaccard, 5 characters) to an earlier one reaches this are dropped",
        gt=0,
        le=1,
    )
    languages: list[str] = Field(
        [], title="Languages", description="ISO codes such as en; prompts in others are dropped (extra: language)"
    )
    evaluation_sets: list[str] = Field(
        [], title="Evaluation sets", description="prompts/NAME of sets that training data must not overlap"
    )
    evaluation_words: int = Field(
        13, title="Overlap", description="Words in a row that a prompt may not share with an evaluation set", ge=1
    )
    max_pairs_per_group: int | None = Field(
        None, title="Quota", description="At most so many pairs per group, chosen by a hash of the seed", ge=1
    )
    group_quotas: list[str] = Field(
        [], title="Quotas of groups", description="group=pairs; takes the place of the quota for that group"
    )
    min_pairs_per_group: int = Field(
        0, title="Minimum", description="A group with fewer pairs is an error: nothing is published", ge=0
    )
    balance: Literal["none", "smallest"] = Field(
        "none", title="Balance", description="smallest: every group keeps as many pairs as the one that has fewest"
    )
    test_share: float = Field(
        0.0, title="Test share", description="Of the prompts, by hash; their pairs go to the split test", ge=0, lt=1
    )
    seed: int = Field(0, title="Seed", description="Of best_vs_random, quotas and the test split", ge=0, lt=2**31)

    @field_validator("group_quotas")
    @classmethod
    def _quotas_are_numbers(cls, quotas: list[str]) -> list[str]:
        for quota in quotas:
            if not re.fullmatch(r".+=[0-9]{1,15}", quota):
                raise ValueError(f'group quota "{quota}": write group=pairs, such as child=500')
        return quotas
