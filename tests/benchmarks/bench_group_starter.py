"""The starter's smallest group, auditors, after DPO on 400 pairs of which a tenth are theirs: mean, IS and GR.

    PYTHONPATH=. .venv/bin/python tests/benchmarks/bench_group_starter.py [--arm-seeds 0 1 2] [--losses dpo dpo+nll]

Every seed shuffles the starter's prompts, draws 8 answers to 400 of them and pairs the best with the worst by the
reward model. Other prompts, 60 of auditors and 30 of each other group, are then answered 6 times by every model, and
the true rule says which answers are right. Writes bench-results/group_starter_LOSS.json.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from group_arms import Metrics, over_seeds, table, train_arm
from harness import options, show
from starter_runs import Starter, prompts

from runtime.alignment.collate import PreferenceRow
from runtime.alignment.config import OfflineConfig
from runtime.alignment.groups import GroupSettings, Reducer
from runtime.alignment.losses import LossSettings
from runtime.alignment.offline import PairRows
from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutSchedule
from runtime.decoding.sampling import SamplingConfig
from runtime.models import LoadedModel, load_policy
from runtime.records import FINISHED, Prompt
from runtime.starter import path
from runtime.starter.rule import truth

N_PROMPTS, N_TRAIN = 1000, 400
N_HELD_OUT: dict[str, int] = {"child": 30, "clerk": 30, "auditor": 60}
N_CANDIDATES, N_SAMPLES, MAX_ROWS = 8, 6, 128
PLAIN = LossSettings("dpo", beta=0.1)
# All numbers here were chosen on seed 100, which is not reported: the learning rate of the plain loss as the best of
# four for the mean, the step sizes among three.
STUDIES = {
    "dpo": (OfflineConfig(PLAIN, learning_rate=5e-5, epochs=2, batch_size=16, max_length=256), 0.1),
    "dpo+nll": (
        OfflineConfig(replace(PLAIN, nll_weight=5.0), learning_rate=4e-4, epochs=3, batch_size=16, max_length=256),
        0.02,
    ),
}


def main() -> None:
    settings = options(__doc__, arm_seeds=[0, 1, 2], losses=list(STUDIES))
    found = over_seeds(settings.arm_seeds, lambda seed: arms(seed, settings.losses))
    for loss in settings.losses:
        own = {name.removeprefix(f"{loss}, "): runs for name, runs in found.items() if name.startswith(f"{loss}, ")}
        show(f"group_starter_{loss}", settings, table({"start": found["start"], **own}, against="mean"))


def arms(seed: int, losses: Sequence[str]) -> dict[str, Metrics]:
    """The starter itself, and every reducer with every loss on the pairs of one seed."""
    train, held_out = split(seed)
    pairs = best_and_worst(train, seed)
    found = {"start": answered(load_policy(str(path("policy"))), held_out, seed)}
    for loss in losses:
        config, step_size = STUDIES[loss]
        for reducer in get_args(Reducer):
            loaded, groups = load_policy(str(path("policy"))), GroupSettings(reducer, step_size)
            trained = train_arm(loaded, PairRows(pairs), replace(config, seed=seed), groups)
            found[f"{loss}, {reducer}"] = answered(loaded, held_out, seed) | trained
    return found


def split(seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts for the pairs in the starter's own shares, and others to hold out."""
    asked = prompts(0, N_PROMPTS)
    random.Random(seed).shuffle(asked)
    rest = asked[N_TRAIN:]
    return asked[:N_TRAIN], [p for group, n in N_HELD_OUT.items() for p in [p for p in rest if p.group == group][:n]]


def best_and_worst(asked: Sequence[Prompt], seed: int) -> list[PreferenceRow]:
    """One pair per prompt, by the shipped reward model; prompts whose answers tie give none."""
    starter = Starter.load("cpu")
    pairs = []
    for prompt, candidates in zip(asked, _answers(starter.policy, asked, N_CANDIDATES, seed), strict=True):
        scores = starter.reward.score([prompt] * len(candidates), candidates)
        ranked = sorted((s.value, text) for s, text in zip(scores, candidates, strict=True) if s.value is not None)
        if ranked and ranked[-1][0] > ranked[0][0]:
            row = PreferenceRow(prompt.prompt_id, prompt.group, prompt.messages, ranked[-1][1], ranked[0][1])
            pairs.append(row)
    return pairs


def answered(loaded: LoadedModel, asked: Sequence[Prompt], seed: int) -> Metrics:
    """Share of right answers in every group, and in the worst."""
    loaded.model.eval()
    shares: dict[str, list[float]] = {}
    for prompt, texts in zip(asked, _answers(loaded, asked, N_SAMPLES, seed), strict=True):
        shares.setdefault(prompt.group, []).append(sum(truth(prompt, text) for text in texts) / N_SAMPLES)
    means = {group: statistics.fmean(values) for group, values in shares.items()}
    return {**{f"{group} truth": mean for group, mean in means.items()}, "worst truth": min(means.values())}


def _answers(loaded: LoadedModel, asked: Sequence[Prompt], n: int, seed: int) -> list[list[str]]:
    """The finished answers to every prompt."""
    engine = Engine(loaded, SamplingConfig(n=n, seed=seed), CutSchedule(), None, MAX_ROWS)
    return [[c.response for c in found if c.finish_reason in FINISHED] for found in engine.generate(asked)]


if __name__ == "__main__":
    main()
