"""The loss of some answers of an experience, under the weights as they are now."""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.alignment.collate import rows_of
from runtime.alignment.logps import TokenLogps, token_logps
from runtime.alignment.losses import Losses
from runtime.alignment.online import surrogates
from runtime.alignment.online.experience import Experience
from runtime.alignment.online.players import Players
from runtime.alignment.online.settings import OnlineSettings


@dataclass(frozen=True, slots=True)
class Lesson:
    """Some prompts of an experience, of one update whose answers' lengths `divisor` stands for (`divisor_of`)."""

    experience: Experience
    prompts: Tensor  # indices, int64
    divisor: float | None

    @property
    def rows(self) -> Tensor:
        """Their answers."""
        n = self.experience.rollout.n_samples
        return (self.prompts[:, None] * n + torch.arange(n, device=self.prompts.device)).flatten()


def lesson_losses(lesson: Lesson, players: Players, settings: OnlineSettings, temperature: float) -> Losses:
    """Per answer, with the share of its tokens that the clip holds; answers that do not count have loss 0."""
    found, rows = lesson.experience, lesson.rows
    batch = rows_of(found.rollout.batch, rows)
    now = token_logps(players.model, batch, temperature, players.value_head)
    if settings.method in ("jbond", "bond"):
        per_sample, clipped = _toward_best(lesson, players, settings, now, temperature), torch.zeros(len(rows))
    else:
        per_sample, clipped = _by_advantage(lesson, settings, now)
    counted = torch.where(found.is_usable[rows], per_sample, torch.zeros_like(per_sample))
    return Losses(counted, {"clipped": clipped.to(counted.device)})


def _by_advantage(lesson: Lesson, settings: OnlineSettings, now: TokenLogps) -> tuple[Tensor, Tensor]:
    """Losses, and the share of each answer's tokens that the clip holds."""
    found, rows = lesson.experience, lesson.rows
    width = now.logps.shape[1]
    old, reference, mask = (part[rows, :width] for part in (found.old.logps, found.reference, found.mask))
    if settings.method == "rloo":  # an answer is one action
        own, before = (surrogates.summed(part, mask)[:, None] for part in (now.logps, old))
        losses, is_held = surrogates.clipped_losses(own, before, found.advantages[rows, None], settings.clip)
        return losses[:, 0], is_held[:, 0].float()
    worth = found.advantages[rows, :width] if found.advantages.dim() == 2 else found.advantages[rows, None]
    if settings.method == "remax":
        return surrogates.per_answer(-worth * now.logps, mask, lesson.divisor), torch.zeros(len(rows))
    losses, is_held = surrogates.clipped_losses(now.logps, old, worth, settings.clip)
    if settings.method == "grpo" and settings.kl_weight:
        losses = losses + settings.kl_weight * surrogates.k3(now.logps, reference)
    if settings.method == "ppo":
        losses = losses + settings.value_coef * _value_losses(lesson, settings, now)
    held = surrogates.summed(is_held.float(), mask) / mask.sum(dim=1).clamp(min=1)
    return surrogates.per_answer(losses, mask, lesson.divisor), held


def _value_losses(lesson: Lesson, settings: OnlineSettings, now: TokenLogps) -> Tensor:
    found, rows = lesson.experience, lesson.rows
    assert found.returns is not None and found.old.values is not None and now.values is not None
    width = now.values.shape[1]
    old, returns = found.old.values[rows, :width], found.returns[rows, :width]
    return surrogates.clipped_value_losses(now.values, old, returns, settings.value_clip)


def _toward_best(
    lesson: Lesson, players: Players, settings: OnlineSettings, now: TokenLogps, temperature: float
) -> Tensor:
    found, rows = lesson.experience, lesson.rows
    assert found.best is not None and found.anchor is not None
    best = rows_of(found.best, lesson.prompts)
    # The answers of one prompt share the likelihood of its best one.
    n = found.rollout.n_samples
    of_best = surrogates.summed(token_logps(players.model, best, temperature).logps, best.is_answer[:, 1:])
    policy = surrogates.summed(now.logps, found.mask[rows, : now.logps.shape[1]])
    weights = settings.jeffreys, settings.anchor_weight
    return surrogates.jbond_losses(
        of_best.repeat_interleave(n), policy, found.anchor[rows], found.advantages[rows], weights
    )
