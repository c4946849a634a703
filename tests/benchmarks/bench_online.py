"""On-policy methods and iterated best-of-n on the starter: right answers, reward and KL as answers are drawn.

    PYTHONPATH=. .venv/bin/python tests/benchmarks/bench_online.py [--methods grpo jbond] [--arm-seeds 0 1 2]

Every method draws about 2,560 answers, a training's own anchors and baselines included, and learns from the shipped
reward model. The same held-out prompts are answered with the same noise as it goes on; the true rule says which of
those answers are right, and nothing learns from it. Writes bench-results/online.json and, with --plot FILE, the curves.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
STEPS = 20
# Per method: prompts per step so that a step draws 128 answers (jbond 144: one and two anchors to each of 48 prompts).
ON_POLICY: dict[str, tuple[OnlineSettings, int]] = {
    "grpo": (OnlineSettings("grpo", samples=8), 16),
    "rloo": (OnlineSettings("rloo", samples=8), 16),
    "ppo": (OnlineSettings("ppo", epochs=2, minibatches=2), 128),
    "remax": (OnlineSettings("remax", samples=3, kl_coef=0.02), 32),
    # The anchor follows ten times as fast as the paper's, which trains for thousands of steps.
    "jbond": (OnlineSettings("jbond", anchor_rate=0.2), 48),
}
# One answer less a greedy one is a noisier judgement than a place among eight.
RATES = {"remax": 2e-4, "jbond": 5e-4}
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
    settings = options(
        __doc__, methods=[*ON_POLICY, "best_of_n"], arm_seeds=[0, 1, 2], learning_rate=3e-4, steps=STEPS, plot=""
    )
    found: dict[str, list[Curve]] = {method: [] for method in settings.methods}
    for seed in settings.arm_seeds:
        for method in settings.methods:
            curve = best_of_n(seed) if method == "best_of_n" else on_policy(method, seed, settings)
            found[method].append(curve)
            print(f"seed {seed}, {method}: {json.dumps(_shown(curve))}", flush=True)
            show("online", settings, [row(name, curves) for name, curves in found.items() if curves])
    show("online_curves", settings, list(front(found)))
    if settings.plot:
        plot(found, Path(settings.plot))


def questions(seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, others for every seed, and the held-out ones, which are always the same."""
    train, held_out = random.Random(1000 + seed), random.Random(1)
    return (
        [as_prompt(f"train-{i}", draw_question(train, False)) for i in range(N_PROMPTS)],
        [as_prompt(f"held-out-{i}", draw_question(held_out, True)) for i in range(N_HELD_OUT)],
    )


def on_policy(method: str, seed: int, settings: argparse.Namespace) -> Curve:
    """One training by `train_online`."""
    starter, (train, held_out) = Starter.load("cpu"), questions(seed)
    own, n_prompts = ON_POLICY[method]
    config = OnlineConfig(
        method=own,
        drawing=replace(DRAWING, seed=seed),
        steps=settings.steps,
        prompts_per_step=n_prompts,
        learning_rate=RATES.get(method, settings.learning_rate),
        eval_steps=settings.steps // LOOKS,
        eval_samples=EVAL_SAMPLES,
        seed=seed,
    )
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        places = Places(Path(folder) / "model", Path(folder) / "work")
        report = train_online(starter.policy, Task(train, starter.reward, held_out, truth), config, places)
    figures = {metric: report.curve(metric, "test") for metric in METRICS}
    per_step = n_prompts * (own.n_samples + {"jbond": 2, "remax": 1}.get(method, 0))  # anchors, greedy baseline
    answers = [look * per_step * (settings.steps // LOOKS) for look in range(len(figures["truth"]))]
    groups = {name: values["truth"] for name, values in report.held_out.items() if name}
    return Curve(answers, figures, groups, time.process_time() - started)


def best_of_n(seed: int) -> Curve:
    """Rounds of best-of-16 with cuts, whose winners are imitated; every round starts from the last one's model."""
    starter, (train, held_out) = Starter.load("cpu"), questions(seed)
    policy, looks, started = starter.policy, [look(starter, starter.policy, held_out)], time.process_time()
    for number in range(ROUNDS):
        asked = train[number * ROUND_PROMPTS :][:ROUND_PROMPTS]
        rows = PairRows(winners(policy, starter, asked, seed * ROUNDS + number))
        with tempfile.TemporaryDirectory() as folder:
            places = Places(Path(folder) / "model", Path(folder) / "work")
            train_offline(policy, rows, replace(DISTIL, seed=seed), places)
        policy.model.train(False)
        looks.append(look(starter, policy, held_out))
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


def look(starter: Starter, policy: LoadedModel, held_out: Sequence[Prompt]) -> dict[str, dict[str, float]]:
    """What `train_online` shows of its policy, of this one, against the starter as its reference."""
    players = Players.of(load_policy(str(path("policy"))), None, Cast(), 0)
    players.model.load_state_dict(policy.model.state_dict())
    gatherer = Gatherer(players, Sampler(starter.reward, DRAWING), OnlineSettings(), rows=64)
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


def front(found: dict[str, list[Curve]]) -> Iterator[dict[str, object]]:
    """Reward and KL as answers are drawn, means over seeds."""
    for method, curves in found.items():
        for place, answers in enumerate(curves[0].answers):
            means = {m: statistics.fmean(curve.figures[m][place] for curve in curves) for m in METRICS}
            yield {"method": method, "answers": answers, **means}


def plot(found: dict[str, list[Curve]], file: Path) -> None:
    """Right answers against answers drawn, and reward against KL."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for method, curves in found.items():
        means = {m: [statistics.fmean(v) for v in zip(*(c.figures[m] for c in curves), strict=True)] for m in METRICS}
        left.plot(curves[0].answers, means["truth"], marker=".", label=method)
        right.plot(means["kl"], means["reward"], marker=".", label=method)
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
