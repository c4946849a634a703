"""What the group benchmarks report is what the trainer measured on held-out pairs."""

from pathlib import Path

import pytest

from runtime.alignment.groups import GroupSettings
from runtime.alignment.offline import PairRows
from runtime.models import load_policy
from tests.benchmarks.group_arms import table, train_arm
from tests.runtime.alignment.trained import DPO, rows


def test_the_worst_group_and_the_gap_are_those_of_the_held_out_accuracies(tiny_policy_dir: Path) -> None:
    pairs = PairRows(rows(8), rows(20)[8:])
    found = {
        reducer: train_arm(load_policy(str(tiny_policy_dir)), pairs, DPO, GroupSettings(reducer, step_size=0.5))
        for reducer in ("mean", "robust")
    }
    for metrics in found.values():
        accuracies = [metrics["child accuracy"], metrics["clerk accuracy"]]
        assert metrics["worst accuracy"] == min(accuracies)
        assert metrics["gap"] == max(accuracies) - min(accuracies)
        assert metrics["worst loss"] == max(metrics["child loss"], metrics["clerk loss"])
        assert metrics["CPU seconds"] > 0
    assert "child weight" not in found["mean"]
    assert found["robust"]["child weight"] + found["robust"]["clerk weight"] == pytest.approx(1)


def test_the_table_has_means_over_seeds_and_changes_against_one_arm() -> None:
    found = {
        "mean": [{"worst": 0.2}, {"worst": 0.4}],
        "robust": [{"worst": 0.5, "weight": 0.7}, {"worst": 0.6, "weight": 0.9}],
    }
    assert table(found, against="mean") == [
        {"figure": "worst", "mean": "0.300", "mean, seeds": "0.200 0.400", "robust": "0.550"}
        | {"robust, seeds": "0.500 0.600", "robust, change": "+0.250"},
        {"figure": "weight", "robust": "0.800", "robust, seeds": "0.700 0.900"},
    ]
