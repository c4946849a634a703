"""The one loop of all on-policy methods: draw, judge, update, look at held-out prompts now and then."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from runtime.alignment.adapters import merged
from runtime.alignment.config import Places
from runtime.alignment.figures import ALL, Figures, GroupSums
from runtime.alignment.groups import GroupReducer
from runtime.alignment.offline import ADAPTER, without_dropout
from runtime.alignment.online.evaluation import Evaluation
from runtime.alignment.online.experience import Experience, Gatherer
from runtime.alignment.online.lessons import Lesson, lesson_losses
from runtime.alignment.online.players import Cast, Players
from runtime.alignment.online.ranks import Ranks
from runtime.alignment.online.rollout import PromptOrder, Sampler
from runtime.alignment.online.state import load_state, save_state
from runtime.alignment.online.surrogates import divisor_of, summed
from runtime.alignment.online.training import OnlineConfig, OnlineReport, Shown, Truth
from runtime.alignment.report import Point, Warned
from runtime.alignment.trainer import DivergedError
from runtime.errors import ConfigError, InputError, ModelError
from runtime.models import LoadedModel, quiet
from runtime.records import Progress, Prompt
from runtime.rewards.protocol import Reward

CONSTANT_STEPS = 5  # without two different rewards, after which there is nothing to learn from
KL_STEERING = (0.2, 0.1)  # largest relative error that counts, and how fast kl_coef follows it (arXiv 1909.08593, 2.2)


@dataclass(frozen=True, slots=True)
class Task:
    """Prompts to train on and held-out ones, what scores the answers, and what is true of them (for figures alone)."""

    prompts: Sequence[Prompt]
    reward: Reward
    held_out: Sequence[Prompt] = ()
    truth: Truth | None = None


def train_online(
    loaded: LoadedModel, task: Task, config: OnlineConfig, places: Places, on_progress: Progress | None = None
) -> OnlineReport:
    """Train `loaded.model` in place and write a plain Hugging Face folder (LoRA: merged, with `adapter/` beside it).

    A training that finds a checkpoint of its own in `places.work` goes on from there, to the same weights as one that
    was never stopped. Raises InputError where nothing can be learnt from the rewards, and DivergedError, which names
    the last checkpoint, when the loss leaves the numbers or the policy its reference.
    """
    if config.eval_steps and not task.held_out:
        raise InputError(f"eval_steps = {config.eval_steps}, but there is no held-out prompt; set 0 or hold some out")
    without_dropout(loaded.model)
    training = _Training(loaded, task, config, places.work)
    report = training.run(on_progress)
    if training.ranks.is_first:
        _write(training.players, loaded, config, places)
    training.ranks.wait()
    return report


def _write(players: Players, loaded: LoadedModel, config: OnlineConfig, places: Places) -> None:
    with quiet():
        model = players.model
        if config.lora is not None:
            cast(Any, model).save_pretrained(places.output / ADAPTER, selected_adapters=["default"])
            model = merged(model)
        model.save_pretrained(places.output)
        loaded.tokenizer.save_pretrained(places.output)


class _Training:
    """One call of `train_online`."""

    def __init__(self, loaded: LoadedModel, task: Task, config: OnlineConfig, work: Path) -> None:
        self.config, self.work, settings = config, work, config.method
        roles = Cast(has_anchor=settings.method == "jbond", has_values=settings.method == "ppo")
        self.players = Players.of(loaded, config.lora, roles, config.seed)
        self.optimizer = _optimizer(self.players, config)
        self.ranks = Ranks()
        if config.prompts_per_step < self.ranks.size * settings.minibatches:
            raise ConfigError(
                f"prompts_per_step = {config.prompts_per_step}: {self.ranks.size} processes with minibatches = "
                f"{settings.minibatches} share them; use at least {self.ranks.size * settings.minibatches}"
            )
        self.gatherer = Gatherer(self.players, Sampler(task.reward, config.drawing, self.ranks), settings, config.rows)
        self.order = PromptOrder(task.prompts, config.prompts_per_step, config.seed)
        counts = Counter(prompt.group for prompt in task.prompts)
        self.reducer = GroupReducer(settings.group_weights, counts)
        self.evaluation = Evaluation(self.gatherer, task.held_out, config.eval_samples, task.truth)
        self.report = OnlineReport()
        self.unscored: Counter[str] = Counter()
        self.kl_coef, self.n_constant = settings.kl_weight, 0
        self.scale: tuple[float, float] | None = None  # highest reward and standard deviation of the first step

    def run(self, on_progress: Progress | None) -> OnlineReport:
        """All steps that are left."""
        state = load_state(self.work, self.players, self.optimizer)
        if state is not None:
            self._restore(state)
        elif self.config.eval_steps:
            self._evaluate(0)
        for step in range(self.report.steps, self.config.steps):
            try:
                self._step(step)
            except DivergedError as error:
                raise DivergedError(f"{error} ({self._fate()})") from error
            except ModelError as error:  # the engine's, of logits that are no numbers
                what = f"the policy can no longer answer at step {step}; lower learning_rate"
                raise DivergedError(f"{what} ({self._fate()})") from error
            done = self.report.steps = step + 1
            if self.config.eval_steps and (done % self.config.eval_steps == 0 or done == self.config.steps):
                self._evaluate(done)
            if self.config.save_steps and done % self.config.save_steps == 0 and self.ranks.is_first:
                save_state(self.work, done, self.players, self.optimizer, self._state())
            if on_progress is not None and self.ranks.is_first:
                on_progress(done, self.config.steps)
        self.report.unscored = dict(self.unscored)
        return self.report

    def _step(self, step: int) -> None:
        found = self.gatherer.gather(self.order.at(step), f"step {step}", self.kl_coef)
        self._count(found)
        kl = self._mean(summed(found.kl, found.mask), found.is_usable)
        if not kl <= self.config.kl_limit:
            raise DivergedError(
                f"the policy is {kl:.3g} nats per answer from its reference before step {step}, above kl_limit = "
                f"{self.config.kl_limit}; lower learning_rate or raise kl_coef"
            )
        sums, extra = GroupSums(self.reducer.names), dict(found.notes) | {"kl_coef": self.kl_coef}
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._schedule(step)
        for _ in range(self.config.method.epochs if bool(found.is_usable.any()) else 0):
            for prompts in self._minibatches(found, step):
                extra["grad_norm"] = self._update(found, prompts, sums)
        if self.players.anchor is not None:
            self.players.follow(self.config.method.anchor_rate)
        self._move_group_weights(found)
        self._steer(kl)
        self._keep(step + 1, sums, extra | {"learning_rate": self.optimizer.param_groups[0]["lr"]})

    def _update(self, found: Experience, prompts: Tensor, sums: GroupSums) -> float:
        """One optimizer step on the answers to some prompts; the norm of its gradient."""
        config, n = self.config, found.rollout.n_samples
        rows = Lesson(found, prompts, None).rows
        n_usable = int(found.is_usable[rows].sum())
        how = "token" if config.method.method in ("ppo", "remax") else config.method.aggregation
        divisor = divisor_of(how, found.mask[rows][found.is_usable[rows]], config.drawing.max_new_tokens)
        group_ids = self.reducer.ids_of(found.rollout.groups).to(rows.device)
        for part in torch.split(self.ranks.own(prompts), max(1, config.rows // n)):
            lesson = Lesson(found, part, divisor)
            losses = lesson_losses(lesson, self.players, config.method, config.drawing.temperature)
            ids = group_ids[lesson.rows]
            sums.add(losses, ids)
            share = len(ids) / max(n_usable, 1)
            (self.reducer.reduce(losses.per_sample, ids) * share).backward()  # type: ignore[no-untyped-call]
        self.ranks.add_gradients(self.players.trained().values())
        norm = float(nn.utils.clip_grad_norm_(list(self.players.trained().values()), config.max_grad_norm))
        if not math.isfinite(norm):
            raise DivergedError(f"the gradient is {norm} at step {self.report.steps}; lower learning_rate")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _minibatches(self, found: Experience, step: int) -> Iterator[Tensor]:
        """Prompts of each update of an epoch, in an order of its own per step."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        order = torch.randperm(len(found.rollout.prompts), generator=generator).to(found.is_usable.device)
        n_prompts = math.ceil(len(order) / self.config.method.minibatches)
        for prompts in torch.split(order, n_prompts):
            if bool(found.is_usable[Lesson(found, prompts, None).rows].any()):
                yield prompts

    def _count(self, found: Experience) -> None:
        """Take note of answers; InputError where their rewards say nothing."""
        rollout = found.rollout
        self.report.n_answers += len(rollout.answers)
        self.report.n_tokens += int(found.mask.sum())
        n_late = sum(answer.finish_reason == "length" for answer in rollout.answers)
        self.report.truncated += n_late
        found.notes["truncated"] = n_late / len(rollout.answers)
        self.unscored.update(rollout.errors)
        if not bool(rollout.is_scored.any()):
            error = next(iter(rollout.errors), "no answer was drawn")
            raise InputError(f"no answer of step {self.report.steps} could be scored: {error}")
        rewards = rollout.rewards[rollout.is_scored]
        self.n_constant = self.n_constant + 1 if bool((rewards == rewards[0]).all()) else 0
        if self.n_constant >= CONSTANT_STEPS and len(rewards) > 1:
            raise InputError(
                f"the reward was {float(rewards[0]):.4g} for every answer of {CONSTANT_STEPS} steps; "
                "a policy cannot learn from a constant: check the reward"
            )

    def _move_group_weights(self, found: Experience) -> None:
        """By the groups' regret: how far rewards are below the first step's highest, in its standard deviations."""
        rewards = found.rollout.rewards[found.rollout.is_scored]
        if self.scale is None:
            spread = float(rewards.std()) if len(rewards) > 1 else 0.0
            self.scale = (float(rewards.max()), spread or 1.0)
        highest, spread = self.scale
        ids = self.reducer.ids_of(found.rollout.groups).to(rewards.device)[found.rollout.is_scored]
        self.reducer.observe((highest - rewards) / spread, ids)
        self.reducer.step()

    def _steer(self, kl: float) -> None:
        target = self.config.method.kl_target
        if target is not None:
            most, rate = KL_STEERING
            self.kl_coef *= 1 + rate * max(-most, min(most, kl / target - 1))

    def _evaluate(self, step: int) -> None:
        figures, shown = self.evaluation.run(step)
        self.report.held_out = figures
        self.report.shown += shown
        self._points(step, "test", figures)
        self.report.warnings += [one for one in self.evaluation.alarms() if one not in self.report.warnings]

    def _keep(self, step: int, sums: GroupSums, extra: dict[str, float]) -> None:
        figures: Figures = {ALL: {}} if sums.is_empty else sums.figures(self.ranks.added)
        loss = figures[ALL].get("loss", 0.0)
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {step}; lower learning_rate")
        figures[ALL] |= extra
        if self.config.method.group_weights.reducer != "mean":
            for name, weight in zip(self.reducer.names, self.reducer.weights.tolist(), strict=True):
                figures.setdefault(name, {})["weight"] = weight
        self._points(step, "train", figures)

    def _points(self, step: int, split: str, figures: Figures) -> None:
        for name, values in figures.items():
            known = ((metric, value) for metric, value in values.items() if metric != "pairs")
            self.report.points += [Point(step, split, name or None, metric, value) for metric, value in known]

    def _schedule(self, step: int) -> float:
        """Linear warm-up, then constant: an on-policy training has no end that it must cool down for."""
        n_warm = self.config.warmup_ratio * self.config.steps
        return min(1.0, (step + 1) / n_warm) if n_warm else 1.0

    def _mean(self, values: Tensor, where: Tensor) -> float:
        return float(values[where].mean()) if bool(where.any()) else 0.0

    def _fate(self) -> str:
        from runtime.alignment.checkpoints import last_checkpoint

        kept = last_checkpoint(self.work)
        return f"the last good checkpoint is kept in {kept}" if kept else "there was no checkpoint yet"

    def _state(self) -> dict[str, Any]:
        report = self.report
        return {
            "reducer": self.reducer.state_dict(),
            "kl_coef": self.kl_coef,
            "n_constant": self.n_constant,
            "scale": self.scale,
            "unscored": dict(self.unscored),
            "history": self.evaluation.history,
            "counts": [report.n_answers, report.n_tokens, report.truncated],
            "points": [list(asdict(point).values()) for point in report.points],
            "shown": [list(asdict(one).values()) for one in report.shown],
            "warnings": [list(asdict(one).values()) for one in report.warnings],
            "held_out": report.held_out,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        report = self.report
        self.reducer.load_state_dict(state["reducer"])
        self.kl_coef, self.n_constant = state["kl_coef"], state["n_constant"]
        self.scale = None if state["scale"] is None else tuple(state["scale"])
        self.unscored.update(state["unscored"])
        self.evaluation.history = [(step, values) for step, values in state["history"]]
        report.n_answers, report.n_tokens, report.truncated = state["counts"]
        report.points = [Point(*values) for values in state["points"]]
        report.shown = [Shown(*values) for values in state["shown"]]
        report.warnings = [Warned(*values) for values in state["warnings"]]
        report.steps, report.held_out = state["step"], state["held_out"]


def _optimizer(players: Players, config: OnlineConfig) -> torch.optim.Optimizer:
    """AdamW; a value head, which starts from nothing, has a learning rate of its own."""
    heads = list(players.value_head.parameters()) if players.value_head is not None else []
    weights = [one for one in players.trained().values() if not any(one is head for head in heads)]
    groups = [{"params": weights, "lr": config.learning_rate, "peak": config.learning_rate}]
    if heads:
        rate = config.method.value_learning_rate
        groups.append({"params": heads, "lr": rate, "peak": rate})
    return torch.optim.AdamW(groups, weight_decay=0.0)
