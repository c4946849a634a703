"""What a rollout teaches: advantages and all that the losses of its answers need, computed before the first update."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.alignment.collate import Batch, rows_of
from runtime.alignment.logps import TokenLogps, token_logps
from runtime.alignment.online import advantages as worth
from runtime.alignment.online.players import Other, Players
from runtime.alignment.online.rollout import Rollout, Sampler
from runtime.alignment.online.settings import OnlineSettings
from runtime.alignment.online.surrogates import summed
from runtime.records import Prompt


@dataclass(slots=True)
class Experience:
    """Of the answers of one step, prompt by prompt. Tensors of tokens are (rows, T - 1), as in TokenLogps.

    is_usable: (rows,), whether an answer counts. best: a batch with one answer per prompt that is to become likelier.
    """

    rollout: Rollout
    old: TokenLogps
    reference: Tensor
    advantages: Tensor  # (rows, T - 1), or (rows,) where an answer is worth one number
    is_usable: Tensor
    returns: Tensor | None = None
    anchor: Tensor | None = None  # S of the answers, (rows,)
    best: Batch | None = None
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def mask(self) -> Tensor:
        """Which tokens are the answers'."""
        return self.rollout.batch.is_answer[:, 1:]

    @property
    def kl(self) -> Tensor:
        """The k1 estimate of each token, log policy - log reference."""
        return self.old.logps - self.reference

    def metrics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each answer, (rows,), and whether it is known: a reward of those scored, the others of those drawn."""
        n_tokens = self.mask.sum(dim=1)
        is_drawn = n_tokens > 0
        return {
            "reward": (self.rollout.rewards, self.rollout.is_scored),
            "kl": (summed(self.kl, self.mask), is_drawn),
            "entropy": (summed(self.old.entropy, self.mask) / n_tokens.clamp(min=1), is_drawn),
            "tokens": (n_tokens.float(), is_drawn),
        }


class Gatherer:
    """Draws the answers of a step and judges them."""

    def __init__(self, players: Players, sampler: Sampler, settings: OnlineSettings, rows: int) -> None:
        """rows: answers per forward pass."""
        self.players, self.sampler, self.settings, self.rows = players, sampler, settings, rows

    def gather(self, prompts: Sequence[Prompt], turn: str, kl_coef: float) -> Experience:
        """One step's experience; `turn` names the noise."""
        rollout = self.sampler.draw(self.players.policy, prompts, self.settings.n_samples, turn)
        found = self.judged(rollout)
        judge: dict[str, Callable[[Experience, str, float], None]] = {
            "grpo": self._grpo,
            "rloo": self._rloo,
            "ppo": self._ppo,
            "remax": self._remax,
            "jbond": self._jbond,
            "bond": self._bond,
        }
        judge[self.settings.method](found, turn, kl_coef)
        return found

    def judged(self, rollout: Rollout) -> Experience:
        """Answers with their log-probabilities under policy and reference, and no advantages."""
        with torch.no_grad():
            old = self._logps(rollout.batch, self.players.value_head is not None)
        reference = self._under(self.players.reference, rollout.batch).logps
        return Experience(rollout, old, reference, torch.zeros_like(reference), rollout.is_scored.clone())

    def _grpo(self, found: Experience, turn: str, kl_coef: float) -> None:
        rollout, settings = found.rollout, self.settings
        rewards, is_scored = rollout.by_prompt(rollout.rewards), rollout.by_prompt(rollout.is_scored)
        found.advantages = worth.group_advantages(rewards, is_scored, settings.scale_rewards).flatten()
        differs = worth.has_spread(rewards, is_scored)
        found.notes["equal_rewards"] = _share(~differs, is_scored.any(dim=1))
        if settings.skip_equal:
            found.is_usable &= differs.repeat_interleave(rollout.n_samples)

    def _rloo(self, found: Experience, turn: str, kl_coef: float) -> None:
        rollout = found.rollout
        rewards = rollout.rewards - kl_coef * summed(found.kl, found.mask)
        is_scored = rollout.by_prompt(rollout.is_scored)
        found.advantages = worth.leave_one_out(rollout.by_prompt(rewards), is_scored).flatten()

    def _ppo(self, found: Experience, turn: str, kl_coef: float) -> None:
        settings, values = self.settings, found.old.values
        assert values is not None
        rewards = worth.token_rewards(found.rollout.rewards, found.kl, found.mask, kl_coef)
        mask = found.mask & found.is_usable[:, None]
        gained, found.returns = worth.generalised_advantages(rewards, values, mask, settings.gamma, settings.lam)
        found.advantages = worth.whitened(gained, mask) if settings.whiten else gained

    def _remax(self, found: Experience, turn: str, kl_coef: float) -> None:
        rollout, n = found.rollout, found.rollout.n_samples
        greedy = self.sampler.draw(self.players.policy, rollout.prompts, 1, turn, greedy=True)
        baselines, is_known = (one.repeat_interleave(n) for one in (greedy.rewards, greedy.is_scored))
        found.is_usable &= is_known
        found.advantages = worth.remax_returns(
            rollout.rewards, baselines, found.kl, found.mask, kl_coef, self.settings.gamma
        )

    def _jbond(self, found: Experience, turn: str, kl_coef: float) -> None:
        rollout, anchor = found.rollout, self.players.anchor
        assert anchor is not None
        with anchor.active() as model:
            pairs = self.sampler.draw(model, rollout.prompts, 2, f"{turn} anchor")
        found.anchor = summed(self._under(anchor, rollout.batch).logps, found.mask)
        scores, is_scored = pairs.by_prompt(pairs.rewards), pairs.by_prompt(pairs.is_scored)
        found.is_usable &= is_scored.all(dim=1)
        found.best = rows_of(pairs.batch, _best_rows(scores, 2))
        rewards = worth.jbond_rewards(rollout.rewards, scores)
        found.notes["below_both"] = _share(rewards < 0, found.is_usable)
        policy = summed(found.old.logps, found.mask)
        returns = torch.where(found.is_usable, rewards - (policy - found.anchor), torch.zeros_like(policy))
        n_usable = int(found.is_usable.sum())
        others = (returns.sum() - returns) / max(n_usable - 1, 1)  # the mean return of the rest of the batch
        found.advantages = returns - others

    def _bond(self, found: Experience, turn: str, kl_coef: float) -> None:
        rollout, settings = found.rollout, self.settings
        with self.players.reference.active() as model:
            drawn = self.sampler.draw(model, rollout.prompts, settings.bond_samples, "bond reference")
        scores, is_scored = drawn.by_prompt(drawn.rewards), drawn.by_prompt(drawn.is_scored)
        n = rollout.n_samples
        found.is_usable &= is_scored.all(dim=1).repeat_interleave(n)
        found.best = rows_of(drawn.batch, _best_rows(scores, settings.bond_n))
        quantiles = worth.quantile_rewards(rollout.rewards, scores.repeat_interleave(n, dim=0))
        found.notes["quantile"] = _share(quantiles.exp(), found.is_usable)
        returns = quantiles - summed(found.kl, found.mask) / (settings.bond_n - 1)
        is_usable = rollout.by_prompt(found.is_usable)
        found.advantages = worth.leave_one_out(rollout.by_prompt(returns), is_usable).flatten()
        found.anchor = summed(found.reference, found.mask)

    def _logps(self, batch: Batch, has_values: bool = False) -> TokenLogps:
        head = self.players.value_head if has_values else None
        return self._joined(batch, lambda part: token_logps(self.players.model, part, self._temperature, head))

    def _under(self, other: Other, batch: Batch) -> TokenLogps:
        with other.active() as loaded:
            return self._joined(batch, lambda part: token_logps(loaded.model, part, self._temperature))

    def _joined(self, batch: Batch, compute: Callable[[Batch], TokenLogps]) -> TokenLogps:
        """`compute` of some rows at a time, no wider than they must be, put together as if of all at once."""
        n_rows, width = batch.token_ids.shape
        every = torch.arange(n_rows, device=batch.token_ids.device)
        ranks, found = self.sampler.ranks, torch.empty(0)
        own = ranks.own(every)
        for rows in torch.split(own if len(own) else every[:1], self.rows):
            part = compute(rows_of(batch, rows))
            columns = torch.stack([one for one in (part.logps, part.entropy, part.values) if one is not None])
            if not found.numel():
                found = columns.new_zeros(len(columns), n_rows, width - 1)
            found[:, rows, : columns.shape[2]] = columns
        # A process without a row of its own has only learnt the shape.
        logps, entropy, *values = ranks.added(found if len(own) else torch.zeros_like(found))
        return TokenLogps(logps, entropy, values[0] if values else None)

    @property
    def _temperature(self) -> float:
        return self.sampler.drawing.temperature


def _best_rows(scores: Tensor, n: int) -> Tensor:
    """Row of the best of the first n answers to each prompt, of scores (prompts, samples)."""
    n_prompts, n_samples = scores.shape
    return scores[:, :n].argmax(dim=1) + torch.arange(n_prompts, device=scores.device) * n_samples


def _share(values: Tensor, where: Tensor) -> float:
    return float(values[where].float().mean()) if bool(where.any()) else 0.0
