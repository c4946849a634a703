"""Held-out prompts, answered and judged as training goes on, and the alarm when the reward is being exploited."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from runtime.alignment.figures import ALL, Figures, GroupSums
from runtime.alignment.losses import Losses
from runtime.alignment.online.experience import Gatherer
from runtime.alignment.online.rollout import Rollout
from runtime.alignment.online.surrogates import summed
from runtime.alignment.online.training import Shown, Truth
from runtime.alignment.report import Warned
from runtime.records import Prompt

N_SHOWN = 8  # answers kept for reading, per evaluation
TRUTH_LOSS = 0.05  # below its best so far, while the reward is above what it was then
SURPRISE = 0.5  # nats per token that the reference finds the answers less likely than at first


@dataclass(slots=True)
class Evaluation:
    """The same prompts with the same noise each time."""

    gatherer: Gatherer
    prompts: Sequence[Prompt]
    samples: int
    truth: Truth | None
    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def run(self, step: int) -> tuple[Figures, list[Shown]]:
        """Per group: reward, truth (the share of right answers, pass@1), KL and reference's surprise, tokens."""
        gatherer = self.gatherer
        rollout = gatherer.sampler.draw(gatherer.players.policy, self.prompts, self.samples, "evaluation")
        found = gatherer.judged(rollout)
        mask = rollout.batch.is_answer[:, 1:]
        n_tokens = mask.sum(dim=1).clamp(min=1)
        truths = self._truths(rollout)
        metrics = {
            "reward": rollout.rewards,
            "kl": summed(found.kl, mask),
            "surprise": -summed(found.reference, mask) / n_tokens,
            "tokens": n_tokens.float(),
        }
        if truths is not None:
            metrics["truth"] = truths
        names = sorted({prompt.group for prompt in self.prompts})
        ids = torch.tensor([names.index(group) for group in rollout.groups])
        sums = GroupSums(names)
        sums.add(Losses(-rollout.rewards, metrics), ids)
        figures = {name: _without_loss(values) for name, values in sums.figures(lambda values: values).items()}
        self.history.append((step, figures[ALL]))
        return figures, self._shown(step, rollout, truths)

    def alarms(self) -> list[Warned]:
        """What the last evaluation says about the reward: rising while the truth falls, or while answers get odd."""
        if len(self.history) < 2:
            return []
        step, last = self.history[-1]
        since, before = max(self.history[:-1], key=lambda each: each[1].get("truth", -each[1]["surprise"]))
        if not last["reward"] > before["reward"]:
            return []
        rose = f"from step {since} to {step} the reward rose from {before['reward']:.3g} to {last['reward']:.3g}"
        if "truth" in last and last["truth"] < before["truth"] - TRUTH_LOSS:
            fell = f"the truth fell from {before['truth']:.3g} to {last['truth']:.3g}"
            return [Warned("", f"{rose} while {fell}: the policy exploits the reward")]
        if "truth" not in last and last["surprise"] > before["surprise"] + SURPRISE:
            odd = f"the reference's surprise rose by {last['surprise'] - before['surprise']:.2g} nats per token"
            return [Warned("", f"{rose} and {odd}: the policy may exploit the reward")]
        return []

    def _truths(self, rollout: Rollout) -> torch.Tensor | None:
        if self.truth is None:
            return None
        rows = [prompt for prompt in rollout.prompts for _ in range(rollout.n_samples)]
        found = [self.truth(prompt, answer.response) for prompt, answer in zip(rows, rollout.answers, strict=True)]
        return torch.tensor(found, device=rollout.rewards.device)

    def _shown(self, step: int, rollout: Rollout, truths: torch.Tensor | None) -> list[Shown]:
        n = rollout.n_samples
        found = []
        for place, prompt in enumerate(rollout.prompts[:N_SHOWN]):
            row = place * n
            reward = float(rollout.rewards[row]) if bool(rollout.is_scored[row]) else None
            truth = None if truths is None else float(truths[row])
            text = rollout.answers[row].response
            found.append(Shown(step, prompt.prompt_id, prompt.group, text, reward, truth))
        return found


def _without_loss(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name != "loss"}
