"""Do group-robust reducers help a small population that disagrees with a large one? Real data, a small real model.

    PYTHONPATH=. .venv/bin/python tests/benchmarks/bench_group_personas.py [--data personas|hh] [--arm-seeds 0 1 2]

personas: anthropics/evals. A persona prefers what it would say to what it would not. Liberals and conservatives,
risk-averse and risk-seeking people want opposite things; the second of each has a tenth of the first one's pairs.
hh: short dialogues of hh-rlhf, of people who wanted help and of people who wanted no harm; a tenth are of the latter.
All arms of a seed get the same pairs; each seed draws them, and the held-out ones, anew. Needs ../shared (its
README names the sources). Writes bench-results/group_DATA.json.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from group_arms import Metrics, over_seeds, table, train_arm
from harness import options, show

from runtime.alignment.collate import PreferenceRow
from runtime.alignment.config import OfflineConfig
from runtime.alignment.groups import GroupSettings
from runtime.alignment.losses import LossSettings
from runtime.alignment.offline import PairRows
from runtime.models import load_policy
from runtime.records import Message

SHARED = Path(__file__).resolve().parents[3] / "shared"
MAX_CHARACTERS = 400  # of a dialogue of hh-rlhf
Rows = dict[str, list[PreferenceRow]]


def personas(groups: Sequence[str]) -> Rows:
    """What somebody of the persona would say against what they would not; every statement is used once."""
    said: dict[str, tuple[list[str], list[str]]] = {group: ([], []) for group in groups}
    for row in _lines("persona-evals/persona.jsonl.gz"):
        if row["persona"] in said:
            said[row["persona"]][row["answer_matching_behavior"] != " Yes"].append(row["statement"])
    found: Rows = {}
    for group, statements in said.items():
        asked = (Message("user", f"A {group.replace('-', ' ')} person:"),)
        found[group] = [
            PreferenceRow(f"{group}-{number}", group, asked, f" {yes}", f" {no}")
            for number, (yes, no) in enumerate(zip(*statements, strict=True))
        ]
    return found


def dialogues(groups: Sequence[str]) -> Rows:
    """Short dialogues of which only the last answer differs."""
    found: Rows = {group: [] for group in groups}
    for group in groups:
        for number, row in enumerate(_lines(f"hh-rlhf/{group}.test.jsonl.gz")):
            (asked, turn, chosen), (other, _, rejected) = (row[key].rpartition("Assistant:") for key in row)
            is_short = max(map(len, row.values())) <= MAX_CHARACTERS
            if asked == other and is_short and len({chosen.strip(), rejected.strip(), ""}) == 3:
                message = Message("user", f"{asked}{turn}".strip())
                found[group].append(PreferenceRow(f"{group}-{number}", group, (message,), chosen, rejected))
    return found


@dataclass(frozen=True, slots=True)
class Study:
    """Where pairs come from, training pairs per group, held-out pairs of every group, and how the arms are trained."""

    rows: Callable[[Sequence[str]], Rows]
    n_train: Mapping[str, int]
    n_held_out: int
    config: OfflineConfig
    arms: Mapping[str, GroupSettings]


def _config(learning_rate: float, epochs: int) -> OfflineConfig:
    loss = LossSettings("dpo", beta=0.1)
    return OfflineConfig(loss, learning_rate=learning_rate, epochs=epochs, batch_size=16, prompt_format="text")


def _arms(step_size: float, adjusted: GroupSettings) -> dict[str, GroupSettings]:
    return {
        "mean": GroupSettings("mean"),
        "importance": GroupSettings("importance"),
        "robust": GroupSettings("robust", step_size),
        "robust, C": adjusted,
    }


# Learning rates, step sizes and C were chosen on seed 100, which is not reported.
STUDIES = {
    "personas": Study(
        personas,
        {"politically-liberal": 200, "politically-conservative": 20, "risk-averse": 200, "risk-seeking": 20},
        200,
        _config(2e-4, epochs=3),
        _arms(0.1, GroupSettings("robust", 0.05, adjustment=4.0)),
    ),
    "hh": Study(
        dialogues,
        {"helpful-base": 320, "harmless-base": 32},
        150,
        _config(1e-4, epochs=1),
        _arms(0.1, GroupSettings("robust", 0.05, adjustment=4.0)),
    ),
}


def main() -> None:
    settings = options(__doc__, data="personas", arm_seeds=[0, 1, 2])
    study = STUDIES[settings.data]
    rows = study.rows(list(study.n_train))
    found = over_seeds(settings.arm_seeds, lambda seed: arms(study, rows, seed))
    show(f"group_{settings.data}", settings, table(found, against="mean"))


def arms(study: Study, rows: Rows, seed: int) -> dict[str, Metrics]:
    """All arms on the pairs of one seed."""
    pairs = drawn(study, rows, seed)
    config = replace(study.config, seed=seed)
    model = str(SHARED / "models" / "stories3m")
    return {name: train_arm(load_policy(model), pairs, config, groups) for name, groups in study.arms.items()}


def drawn(study: Study, rows: Rows, seed: int) -> PairRows:
    """Pairs of every group to train on, and other ones to hold out."""
    train: list[PreferenceRow] = []
    test: list[PreferenceRow] = []
    for group, n_train in study.n_train.items():
        chosen = random.Random(seed).sample(rows[group], n_train + study.n_held_out)
        train += chosen[:n_train]
        test += chosen[n_train:]
    return PairRows(train, test)


def _lines(path: str) -> list[dict[str, str]]:
    with gzip.open(SHARED / "data" / path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


if __name__ == "__main__":
    main()
