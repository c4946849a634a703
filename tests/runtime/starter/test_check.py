"""The shipped starter keeps its promises (a smaller sample than `winnow starter check`, with room for chance)."""

import pytest

from runtime.starter import path
from runtime.starter.check import CheckSettings, check


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_shipped_starter_is_imperfect_improvable_and_its_scores_mean_something() -> None:
    figures = check(path("policy").parent, CheckSettings(n_prompts=300, n_samples=64))
    assert 0.30 <= figures["pass_at_1"] <= 0.60
    assert figures["best_of_64"] >= 0.90
    assert figures["reward_pair_accuracy"] >= 0.90
    assert figures["partial_pearson"] >= 0.40
    assert figures["share_of_20_to_120_tokens"] >= 0.90
    assert figures["s3d_tokens_per_round"] >= 2.2
