"""On-policy methods and iterated best-of-n on the starter: right answers, reward and KL as answers are drawn.

    PYTHONPATH=. .venv/bin/python tests/benchmarks/bench_online.py [--methods grpo jbond] [--arm-seeds 0 1 2]

Every method draws about 2,560 answers (jbond 2,880, remax three times as many), a training's own anchors
and baselines included, and learns from the shipped reward model. The same held-out prompts are answered with the same
noise as it goes on; the true rule says which of those answers are right, and nothing learns from it. Writes
bench-results/online.json and, with --plot FILE, the curves.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import options, show
from starter_runs import Starter

from runtime.alignment.collate import PreferenceRow
from runtime.alignment.config import OfflineConfig, Places
from runtime.alignment.losses import LossSettings
from runtime.alignment.offline import PairRows, train_offline
from runtime.alignment.online.evaluation import Evaluation
from runtime.alignment.online.experience import Gatherer
from runtime.alignment.online.loop import Task, train_online
from runtime.alignment.online.players import Cast, Players
from runtime.alignment.online.rollout import Drawing, Sampler
from runtime.alignment.online.settings import OnlineSettings
from runtime.alignment.online.training import OnlineConfig
from runtime.decoding.engine import Engine
from runtime.decoding.rejection import CutSchedule
from runtime.decoding.sampling import SamplingConfig
from runtime.models import LoadedModel, load_policy
from runtime.records import FINISHED, Prompt
from runtime.starter import path
from runtime.starter.answers import as_prompt
from runtime.starter.problems import draw_question
from runtime.starter.rule import truth

CUTS = CutSchedule((10, 24), (0.5, 0.5))
DRAWING = Drawing(max_new_tokens=96, max_rows=128)
N_PROMPTS, N_HELD_OUT, EVAL_SAMPLES, LOOKS = 2000, 100, 4, 2
METRICS = ("truth", "reward", "kl", "tokens")


@dataclass(frozen=True, slots=True)
class Recipe:
    """One method's training: a step draws answers to so many prompts."""

    method: OnlineSettings
    prompts: int
    steps: int = 20
    learning_rate: float = 3e-4

    @property
    def answers_per_step(self) -> int:
        """With jbond's two of its anchor and remax's greedy one."""
        return self.prompts * (self.method.n_samples + {"jbond": 2, "remax": 1}.get(self.method.method, 0))


ON_POLICY = {
    "grpo": Recipe(OnlineSettings("grpo", samples=8), 16),
    "rloo": Recipe(OnlineSettings("rloo", samples=8), 16),
    "ppo": Recipe(OnlineSettings("ppo", kl_coef=0.1, epochs=2, minibatches=2), 64, 40, 2e-4),
    # One answer less a greedy one is a noisier judgement than a place among eight: more answers, smaller steps.
    "remax": Recipe(OnlineSettings("remax", samples=3, kl_coef=0.02), 32, 60, 2e-4),
    # The anchor follows faster than the paper's, which trains for thousands of steps, and the reward, which seldom
    # fires, weighs less than its half: many small steps towards the better of two.
    "jbond": Recipe(OnlineSettings("jbond", anchor_rate=0.07, jeffreys=0.1), 16, 60, 2e-4),
}
ROUNDS, ROUND_PROMPTS, N_CANDIDATES = 2, 80, 16
DISTIL = OfflineConfig(LossSettings("sft"), learning_rate=4e-4, epochs=3, batch_size=16, max_length=256)


@dataclass(slots=True)
class Curve:
    """Held-out figures of one training after so many answers, and its CPU seconds."""

    answers: list[int]
    figures: dict[str, list[float]]
    groups: dict[str, float]  # right answers of each group at the end
    seconds: float

    @property
    def last(self) -> dict[str, float]:
        """At the end."""
        return {name: values[-1] for name, values in self.figures.items()}


def main() -> None:
    settings = options(__doc__, methods=[*ON_POLICY, "best_of_n"], arm_seeds=[0, 1, 2], plot="")
    found: dict[str, list[Curve]] = {method: [] for method in settings.methods}
    for seed in settings.arm_seeds:
        for method in settings.methods:
            curve = best_of_n(seed) if method == "best_of_n" else on_policy(ON_POLICY[method], seed)
            found[method].append(curve)
            print(f"seed {seed}, {method}: {json.dumps(_shown(curve))}", flush=True)
            show("online", settings, [row(name, curves) for name, curves in found.items() if curves])
    curves = list(front(found))
    show("online_curves", settings, curves)
    if settings.plot:
        plot(curves, Path(settings.plot))


def questions(seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, others for every seed, and the held-out ones, which are always the same."""
    train, held_out = random.Random(1000 + seed), random.Random(1)
    return (
        [as_prompt(f"train-{i}", draw_question(train, False)) for i in range(N_PROMPTS)],
        [as_prompt(f"held-out-{i}", draw_question(held_out, True)) for i in range(N_HELD_OUT)],
    )


def on_policy(recipe: Recipe, seed: int) -> Curve:
    """One training by `train_online`."""
    starter, (train, held_out) = Starter.load("cpu"), questions(seed)
    config = OnlineConfig(
        method=recipe.method,
        drawing=replace(DRAWING, seed=seed),
        steps=recipe.steps,
        prompts_per_step=recipe.prompts,
        learning_rate=recipe.learning_rate,
        eval_steps=recipe.steps // LOOKS,
        eval_samples=EVAL_SAMPLES,
        seed=seed,
    )
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        places = Places(Path(folder) / "model", Path(folder) / "work")
        report = train_online(starter.policy, Task(train, starter.reward, held_out, truth), config, places)
    figures = {metric: report.curve(metric, "test") for metric in METRICS}
    answers = [number * recipe.answers_per_step * (recipe.steps // LOOKS) for number in range(len(figures["truth"]))]
    groups = {name: values["truth"] for name, values in report.held_out.items() if name}
    return Curve(answers, figures, groups, time.process_time() - started)


def best_of_n(seed: int) -> Curve:
    """Rounds of best-of-16 with cuts, whose winners are imitated; every round starts from the last one's model."""
    starter, (train, held_out) = Starter.load("cpu"), questions(seed)
    policy, looks, started = starter.policy, [look(starter, starter.policy, held_out, seed)], time.process_time()
    for number in range(ROUNDS):
        asked = train[number * ROUND_PROMPTS :][:ROUND_PROMPTS]
        rows = PairRows(winners(policy, starter, asked, seed * ROUNDS + number))
        with tempfile.TemporaryDirectory() as folder:
            places = Places(Path(folder) / "model", Path(folder) / "work")
            train_offline(policy, rows, replace(DISTIL, seed=seed), places)
        policy.model.train(False)
        looks.append(look(starter, policy, held_out, seed))
    answers = [number * ROUND_PROMPTS * N_CANDIDATES for number in range(ROUNDS + 1)]
    figures = {metric: [found[""][metric] for found in looks] for metric in METRICS}
    groups = {name: values["truth"] for name, values in looks[-1].items() if name}
    return Curve(answers, figures, groups, time.process_time() - started)


def winners(policy: LoadedModel, starter: Starter, asked: Sequence[Prompt], seed: int) -> list[PreferenceRow]:
    """Each prompt's best answer; the worst finished one beside it is not learnt from."""
    sampling = SamplingConfig(n=N_CANDIDATES, max_new_tokens=DRAWING.max_new_tokens, seed=seed)
    engine = Engine(policy, sampling, CUTS, starter.reward, DRAWING.max_rows)
    rows = []
    for prompt, candidates in zip(asked, engine.generate(asked), strict=True):
        texts = [c.response for c in candidates if c.finish_reason in FINISHED]
        scores = starter.reward.score([prompt] * len(texts), texts)
        ranked = sorted((s.value, text) for s, text in zip(scores, texts, strict=True) if s.value is not None)
        if ranked and ranked[0][1] != ranked[-1][1]:
            rows.append(PreferenceRow(prompt.prompt_id, prompt.group, prompt.messages, ranked[-1][1], ranked[0][1]))
    return rows


def look(starter: Starter, policy: LoadedModel, held_out: Sequence[Prompt], seed: int) -> dict[str, dict[str, float]]:
    """What `train_online` shows of its policy, of this one, against the starter as its reference."""
    players = Players.of(load_policy(str(path("policy"))), None, Cast(), 0)
    players.model.load_state_dict(policy.model.state_dict())
    gatherer = Gatherer(players, Sampler(starter.reward, replace(DRAWING, seed=seed)), OnlineSettings(), rows=64)
    return Evaluation(gatherer, held_out, EVAL_SAMPLES, truth).run(0)[0]


def row(method: str, curves: Sequence[Curve]) -> dict[str, object]:
    """Mean and spread over seeds."""
    ends = [curve.last["truth"] for curve in curves]
    gains = [curve.last["truth"] - curve.figures["truth"][0] for curve in curves]
    groups = sorted(curves[0].groups)
    return {
        "method": method,
        "before": statistics.fmean(curve.figures["truth"][0] for curve in curves),
        "right": statistics.fmean(ends),
        "gain": statistics.fmean(gains),
        "spread": max(ends) - min(ends),
        "seeds": " ".join(f"{end:.3f}" for end in ends),
        **{metric: statistics.fmean(curve.last[metric] for curve in curves) for metric in ("reward", "kl", "tokens")},
        **{name: statistics.fmean(curve.groups[name] for curve in curves) for name in groups},
        "answers": curves[0].answers[-1],
        "CPU seconds": statistics.fmean(curve.seconds for curve in curves),
    }


def front(found: dict[str, list[Curve]]) -> Iterator[dict[str, Any]]:
    """Reward and KL as answers are drawn, means over seeds."""
    for method, curves in found.items():
        for place, answers in enumerate(curves[0].answers):
            means = {m: statistics.fmean(curve.figures[m][place] for curve in curves) for m in METRICS}
            yield {"method": method, "answers": answers, **means}


def plot(curves: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Right answers against answers drawn, and reward against KL; of the rows of `front`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in curves):
        mine = [row for row in curves if row["method"] == method]
        columns = {name: [row[name] for row in mine] for name in ("answers", *METRICS)}
        left.plot(columns["answers"], columns["truth"], marker=".", label=method)
        right.plot(columns["kl"], columns["reward"], marker=".", label=method)
    left.set(xlabel="answers drawn", ylabel="right answers, held-out pass@1")
    right.set(xlabel="KL to the starter, nats per answer", ylabel="reward")
    left.legend()
    figure.savefig(file, dpi=120)


def _shown(curve: Curve) -> dict[str, object]:
    figures = {name: [round(value, 3) for value in values] for name, values in curve.figures.items()}
    groups = {name: round(value, 3) for name, value in curve.groups.items()}
    return {"answers": curve.answers, **figures, "groups": groups, "CPU seconds": round(curve.seconds)}


if __name__ == "__main__":
    main()
