"""The one loop of all on-policy methods: draw, judge, update, look at held-out prompts now and then."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from runtime.alignment.adapters import merged
from runtime.alignment.checkpoints import last_checkpoint
from runtime.alignment.config import Places
from runtime.alignment.figures import ALL, Figures, GroupSums, known_means
from runtime.alignment.groups import GroupReducer
from runtime.alignment.losses import Losses
from runtime.alignment.offline import ADAPTER, without_dropout
from runtime.alignment.online.evaluation import Evaluation
from runtime.alignment.online.experience import Experience, Gatherer
from runtime.alignment.online.lessons import Lesson, lesson_losses
from runtime.alignment.online.players import Cast, Players
from runtime.alignment.online.ranks import Ranks
from runtime.alignment.online.reporter import Reporter
from runtime.alignment.online.rollout import PromptOrder, Sampler
from runtime.alignment.online.settings import OnlineSettings
from runtime.alignment.online.state import load_state, save_state
from runtime.alignment.online.surrogates import divisor_of
from runtime.alignment.online.training import Look, OnlineConfig, OnlineReport, Shown, Truth
from runtime.alignment.report import Point, Warned, points_of
from runtime.alignment.trainer import DivergedError
from runtime.errors import ConfigError, InputError, ModelError
from runtime.models import LoadedModel, quiet
from runtime.records import Progress, Prompt
from runtime.rewards.protocol import Reward

CONSTANT_STEPS = 5  # without two different rewards, after which there is nothing to learn from
LATE_SHARE = 0.5  # of the last of these steps' answers: when more are cut off, the policy seldom ends an answer
KL_STEERING = (0.2, 0.1)  # largest relative error that counts, and how fast kl_coef follows it (arXiv 1909.08593, 2.2)


@dataclass(frozen=True, slots=True)
class Task:
    """Prompts to train on and held-out ones, what scores the answers, and what is true of them (for figures alone).

    on_look is told of every evaluation.
    """

    prompts: Sequence[Prompt]
    reward: Reward
    held_out: Sequence[Prompt] = ()
    truth: Truth | None = None
    on_look: Callable[[Look], None] | None = None


def train_online(
    loaded: LoadedModel, task: Task, config: OnlineConfig, places: Places, on_progress: Progress | None = None
) -> OnlineReport:
    """Train `loaded.model` in place and write a plain Hugging Face folder (LoRA: merged, with `adapter/` beside it).

    A training that finds a checkpoint of its own in `places.work` goes on from there, to the same weights as one that
    was never stopped. Raises InputError where nothing can be learnt from the rewards, and DivergedError, which names
    the last checkpoint, when the loss leaves the numbers or the policy its reference. A checkpoint is written once its
    weights are known to be near their reference, which is when they have drawn the next answers.
    """
    if config.eval_steps and not task.held_out:
        raise InputError(f"eval_steps = {config.eval_steps}, but there is no held-out prompt; set 0 or hold some out")
    without_dropout(loaded.model)
    training = _Training(loaded, task, config, places)
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

    def __init__(self, loaded: LoadedModel, task: Task, config: OnlineConfig, places: Places) -> None:
        self.config, self.work, settings = config, places.work, config.method
        roles = Cast(has_anchor=settings.method == "jbond", has_values=settings.method == "ppo")
        self.players = Players.of(loaded, config.lora, roles, config.seed)
        self.optimizer = _optimizer(self.players, config)
        self.ranks = Ranks()
        self.reporter = Reporter(config, places, self.players.model, self.ranks.is_first)
        self.gatherer = Gatherer(self.players, Sampler(task.reward, config.drawing, self.ranks), settings, config.rows)
        self.order = PromptOrder(task.prompts, config.prompts_per_step, config.seed)
        _check_prompts(self.order.per_step, self.ranks.size, settings)
        counts = Counter(prompt.group for prompt in task.prompts)
        self.reducer = GroupReducer(settings.group_weights, counts)
        self.evaluation = Evaluation(self.gatherer, task.held_out, config.eval_samples, task.truth)
        self.on_look, self.report = task.on_look, OnlineReport()
        self.unscored: Counter[str] = Counter()
        self.kl_coef, self.is_due = settings.kl_weight, False  # is_due: a checkpoint is, once the weights are checked
        self.constant = (0.0, 0)  # the last reward, and for how many steps it has been every answer's
        self.has_varied = False
        self.scale: tuple[float, float] | None = None  # highest reward and standard deviation of the first step

    def run(self, on_progress: Progress | None) -> OnlineReport:
        """All steps that are left, and a check of what they led to."""
        config, report = self.config, self.report
        state = load_state(self.work, self.players, self.optimizer)
        if state is not None:
            self._restore(state)
        self.reporter.begin(report.steps)
        if state is None and config.eval_steps:
            self._evaluate()
        while report.steps < config.steps:
            with self._fate_told():
                if not self._step(report.steps):
                    break
                report.steps += 1
                self.is_due = bool(config.save_steps) and report.steps % config.save_steps == 0
                if config.eval_steps and (report.steps % config.eval_steps == 0 or report.steps == config.steps):
                    self._evaluate()
            if on_progress is not None and self.ranks.is_first:
                on_progress(report.steps, config.steps)
        with self._fate_told():
            self._end()
        self.reporter.end()
        return report

    def _step(self, step: int) -> bool:
        """Draw, judge, update; False where the answers teach nothing any more."""
        found = self.gatherer.gather(self.order.at(step), f"step {step}", self.kl_coef)
        figures = known_means(found.metrics(), found.rollout.groups)
        kl = self._checked(figures)
        if not self._count(found):
            return False
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
        if not sums.is_empty:
            for name, values in sums.figures(self.ranks.added).items():
                figures.setdefault(name, {}).update(values)
        figures[ALL] |= extra | {"learning_rate": self.optimizer.param_groups[0]["lr"]}
        self._keep(step + 1, figures)
        return True

    def _checked(self, figures: Figures) -> float:
        """The mean KL of answers that the present weights have drawn; a checkpoint that was due waits for this."""
        kl = figures[ALL].get("kl", 0.0)
        if not kl <= self.config.kl_limit:
            raise DivergedError(
                f"the policy is {kl:.3g} nats per answer from its reference after {self.report.steps} steps, above "
                f"kl_limit = {self.config.kl_limit}; lower learning_rate or raise kl_coef"
            )
        for name, weight in self.players.trained().items():
            if not bool(weight.isfinite().all()):
                raise DivergedError(f"{name} has no finite values after {self.report.steps} steps; lower learning_rate")
        if self.is_due and self.ranks.is_first:
            save_state(self.work, self.report.steps, self.players, self.optimizer, self._state())
        self.is_due = False
        return kl

    def _end(self) -> None:
        """The last weights are looked at as those of every other step are, by answers that they draw."""
        report, is_seen = self.report, bool(self.evaluation.history)
        if self.config.eval_steps and not (is_seen and self.evaluation.history[-1][0] == report.steps):
            self._evaluate()
        elif self.config.eval_steps:
            self._checked({ALL: self.evaluation.history[-1][1]})
        else:
            sampler, prompts = self.gatherer.sampler, self.order.at(report.steps)
            drawn = sampler.draw(self.players.policy, prompts, 1, f"step {report.steps}")
            self._checked(known_means(self.gatherer.judged(drawn).metrics(), drawn.groups))
        late = report.curve("truncated")[-CONSTANT_STEPS:]
        if late and sum(late) / len(late) > LATE_SHARE:
            report.warnings.append(
                Warned(
                    "",
                    f"{sum(late) / len(late):.0%} of the last answers did not end within max_new_tokens = "
                    f"{self.config.drawing.max_new_tokens}; raise it, or set eos_penalty",
                )
            )
        report.unscored, report.held_out_unscored = dict(self.unscored), dict(self.evaluation.errors)

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
            ids, is_usable = group_ids[lesson.rows], found.is_usable[lesson.rows]
            metrics = {name: values[is_usable] for name, values in losses.metrics.items()}
            sums.add(Losses(losses.per_sample[is_usable], metrics), ids[is_usable])
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
        for prompts in torch.tensor_split(order, self.config.method.minibatches):
            if bool(found.is_usable[Lesson(found, prompts, None).rows].any()):
                yield prompts

    def _count(self, found: Experience) -> bool:
        """Take note of answers; False where their rewards say nothing any more, InputError where they never did."""
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
        value, (before, n_steps) = float(rewards[0]), self.constant
        is_one = bool((rewards == value).all())
        self.has_varied |= not is_one or (n_steps > 0 and value != before)
        self.constant = value, (n_steps if value == before else 0) + 1 if is_one else 0
        if self.constant[1] < CONSTANT_STEPS or len(rewards) == 1:
            return True
        same = f"the reward was {value:.4g} for every answer of {CONSTANT_STEPS} steps"
        if not self.has_varied:
            raise InputError(f"{same}; a policy cannot learn from a constant: check the reward")
        ended = f"the training ended after {self.report.steps} of {self.config.steps} steps"
        self.report.warnings.append(Warned("", f"{same}, which teach nothing more: {ended}"))
        return False

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

    def _evaluate(self) -> None:
        step = self.report.steps
        figures, shown = self.evaluation.run(step)
        alarms = self.evaluation.alarms()
        self.report.held_out = figures
        self.report.shown += shown
        self._points(step, "test", figures)
        self.report.warnings += [one for one in alarms if one not in self.report.warnings]
        if self.on_look is not None and self.ranks.is_first:
            self.on_look(Look(step, shown, alarms))
        self._checked(figures)

    def _keep(self, step: int, figures: Figures) -> None:
        loss = figures[ALL].get("loss", 0.0)
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {step}; lower learning_rate")
        if self.config.method.group_weights.reducer != "mean":
            for name, weight in zip(self.reducer.names, self.reducer.weights.tolist(), strict=True):
                figures.setdefault(name, {})["weight"] = weight
        self._points(step, "train", figures)

    def _points(self, step: int, split: str, figures: Figures) -> None:
        self.report.points += points_of(step, split, figures)
        self.reporter.log(step, split, figures)

    def _schedule(self, step: int) -> float:
        """Linear warm-up, then constant: an on-policy training has no end that it must cool down for."""
        n_warm = self.config.warmup_ratio * self.config.steps
        return min(1.0, (step + 1) / n_warm) if n_warm else 1.0

    @contextmanager
    def _fate_told(self) -> Iterator[None]:
        """Errors say what is left of the training."""
        steps = self.report.steps
        try:
            yield
        except DivergedError as error:
            raise DivergedError(f"{error} ({self._fate()})") from error
        except ModelError as error:  # the engine's, of logits that are no numbers
            what = f"the policy can no longer answer after {self.report.steps} steps; lower learning_rate"
            raise DivergedError(f"{what} ({self._fate()})") from error
        except (InputError, ConfigError) as error:
            raise type(error)(f"{error} ({self._fate()})" if steps else str(error)) from error

    def _fate(self) -> str:
        kept = last_checkpoint(self.work)
        return f"the last good checkpoint is kept in {kept}" if kept else "there was no checkpoint yet"

    def _state(self) -> dict[str, Any]:
        report = self.report
        return {
            "reducer": self.reducer.state_dict(),
            "kl_coef": self.kl_coef,
            "constant": self.constant,
            "has_varied": self.has_varied,
            "scale": self.scale,
            "unscored": [dict(self.unscored), dict(self.evaluation.errors)],
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
        self.kl_coef, self.has_varied = state["kl_coef"], state["has_varied"]
        value, n_steps = state["constant"]
        self.constant = value, n_steps
        self.scale = None if state["scale"] is None else tuple(state["scale"])
        for counter, counts in zip((self.unscored, self.evaluation.errors), state["unscored"], strict=True):
            counter.update(counts)
        self.evaluation.history = [(step, values) for step, values in state["history"]]
        report.n_answers, report.n_tokens, report.truncated = state["counts"]
        report.points = [Point(*values) for values in state["points"]]
        report.shown = [Shown(*values) for values in state["shown"]]
        report.warnings = [Warned(*values) for values in state["warnings"]]
        report.steps, report.held_out = state["step"], state["held_out"]


def _check_prompts(n_prompts: int, n_processes: int, settings: OnlineSettings) -> None:
    """ConfigError where a step has too few prompts, of those that there are, for what shares them."""
    if n_prompts < n_processes * settings.minibatches:
        raise ConfigError(
            f"a step has {n_prompts} prompts, but {n_processes} processes with minibatches = {settings.minibatches} "
            f"share them; use at least {n_processes * settings.minibatches}"
        )
    if settings.method == "jbond" and n_prompts < 2:
        raise ConfigError("there is 1 prompt, but jbond's baseline is the mean of the others; give more")


def _optimizer(players: Players, config: OnlineConfig) -> torch.optim.Optimizer:
    """AdamW; a value head, which starts from nothing, has a learning rate of its own."""
    heads = list(players.value_head.parameters()) if players.value_head is not None else []
    weights = [one for one in players.trained().values() if not any(one is head for head in heads)]
    groups = [{"params": weights, "lr": config.learning_rate, "peak": config.learning_rate}]
    if heads:
        rate = config.method.value_learning_rate
        groups.append({"params": heads, "lr": rate, "peak": rate})
    return torch.optim.AdamW(groups, weight_decay=0.0)
