"""Held-out prompts, answered and judged as training goes on, and the alarm when the reward is being exploited."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from runtime.alignment.figures import ALL, Figures, extremes, known_means
from runtime.alignment.online.experience import Gatherer
from runtime.alignment.online.rollout import Rollout
from runtime.alignment.online.surrogates import summed
from runtime.alignment.online.training import Shown, Truth
from runtime.alignment.report import Warned
from runtime.records import Prompt
from runtime.rewards.verifier import FunctionReward

N_SHOWN = 8  # answers kept for reading, per evaluation
TRUTH_LOSS = 0.05  # below its best so far, while the reward is above what it was then
SURPRISE = 0.5  # nats per token that the reference finds the answers less likely than it once did
# Metrics that a rising reward must not make worse: the sign of better, by how much, and what is said of it.
ALARMS = (
    ("truth", 1, TRUTH_LOSS, "the truth fell from {:.3g} to {:.3g}: the policy exploits the reward"),
    (
        "surprise",
        -1,
        SURPRISE,
        "the reference's surprise rose from {:.3g} to {:.3g} nats per token: the policy may exploit the reward",
    ),
)


@dataclass(slots=True)
class Evaluation:
    """The same prompts with the same noise each time. errors: why answers have no reward or no truth, so far."""

    gatherer: Gatherer
    prompts: Sequence[Prompt]
    samples: int
    truth: Truth | None
    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def run(self, step: int) -> tuple[Figures, list[Shown]]:
        """Per group: reward, truth (the share of right answers, pass@1), KL and reference's surprise, tokens; worst
        group and gap of the first two."""
        gatherer = self.gatherer
        rollout = gatherer.sampler.draw(gatherer.players.policy, self.prompts, self.samples, "evaluation")
        self.errors.update(rollout.errors)
        found = gatherer.judged(rollout)
        metrics = found.metrics()
        n_tokens, is_drawn = metrics["tokens"]
        metrics["surprise"] = -summed(found.reference, found.mask) / n_tokens.clamp(min=1), is_drawn
        truths = self._truths(rollout)
        if truths is not None:
            values = torch.tensor([truth or 0.0 for truth in truths], dtype=torch.float64)
            metrics["truth"] = values, torch.tensor([truth is not None for truth in truths]) & is_drawn.cpu()
        figures = known_means(metrics, rollout.groups)
        figures[ALL] |= extremes(figures)
        self.history.append((step, figures[ALL]))
        return figures, self._shown(step, rollout, truths)

    def alarms(self) -> list[Warned]:
        """What the last evaluation says about the reward: rising while the truth falls, or while answers get odd."""
        found = []
        for metric, sign, limit, text in ALARMS:
            known = [(step, each) for step, each in self.history if metric in each and "reward" in each]
            if len(known) < 2 or known[-1] != self.history[-1]:
                continue
            step, last = known[-1]
            since, before = max(known[:-1], key=lambda each: sign * each[1][metric])
            if last["reward"] > before["reward"] and sign * (before[metric] - last[metric]) > limit:
                rose = (
                    f"from step {since} to {step} the reward rose from {before['reward']:.3g} to {last['reward']:.3g}"
                )
                found.append(Warned("", f"{rose} while {text.format(before[metric], last[metric])}"))
        return found

    def _truths(self, rollout: Rollout) -> list[float | None] | None:
        if self.truth is None:
            return None
        rows = [prompt for prompt in rollout.prompts for _ in range(rollout.n_samples)]
        rule = FunctionReward(self.truth, "the rule")  # whose failures are their rows' alone
        found = rule.score(rows, [answer.response for answer in rollout.answers])
        self.errors.update(f"no truth: {score.error}" for score in found if score.error)
        return [score.value for score in found]

    def _shown(self, step: int, rollout: Rollout, truths: Sequence[float | None] | None) -> list[Shown]:
        n = rollout.n_samples
        found = []
        for place, prompt in enumerate(rollout.prompts[:N_SHOWN]):
            row = place * n
            reward = float(rollout.rewards[row]) if bool(rollout.is_scored[row]) else None
            truth = None if truths is None else truths[row]
            text = rollout.answers[row].response
            found.append(Shown(step, prompt.prompt_id, prompt.group, text, reward, truth))
        return found
