"""From losses per sample to one number: plain mean, every group alike, or the worst group first."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from runtime.errors import ConfigError, InputError, ModelError

Reducer = Literal["mean", "importance", "robust"]
State = dict[str, list[str] | list[int] | list[float] | list[list[float]]]

# suggest_step_size: an average loss adds this to a group's log-weight in one step, so a group whose loss is 20 % above
# the average gains a factor of e over the others in 100 steps.
LOG_WEIGHT_PER_STEP = 0.05


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """mean: every pair alike. importance: every group alike, IS-DPO / IS-IPO. robust: GR-DPO / GR-IPO.

    step_size: eta of the weights' update, to be chosen by the loss's scale (`suggest_step_size`). chi: the share of
    the robust weights, the rest is spread evenly (0 is importance, 1 fully robust). adjustment: C of C / sqrt(N_g),
    which is added to the losses that move the weights.
    """

    reducer: Reducer = "mean"
    step_size: float = 0.01
    chi: float = 1.0
    adjustment: float = 0.0

    def __post_init__(self) -> None:
        """ConfigError for what cannot work."""
        if self.reducer not in ("mean", "importance", "robust"):
            raise ConfigError(f'reducer = "{self.reducer}"; choose one of mean, importance, robust')
        if self.reducer == "robust" and not 0 < self.step_size < math.inf:
            raise ConfigError(
                f"step_size = {self.step_size} never moves the weights; set it above 0 or use reducer = importance"
            )
        if not 0 <= self.chi <= 1:
            raise ConfigError(f"chi = {self.chi} must be between 0 (every group alike) and 1 (fully robust)")
        if not 0 <= self.adjustment < math.inf:
            raise ConfigError(f"adjustment = {self.adjustment} must be 0 or above")


class GroupReducer:
    """Group-robust preference optimisation (arXiv 2405.20304, algorithm 1) on any per-sample loss.

    The objective is sum_g w_g L_g, L_g the mean loss of group g. A sample comes with probability N_g / N, so N / N_g
    times its loss estimates L_g without bias, whatever the batch size. The robust weights rise by
    w_g <- w_g exp(eta N / N_g loss), in log space and float64; a group that a step has not seen keeps its log-weight.
    """

    def __init__(self, settings: GroupSettings, counts: Mapping[str, int]) -> None:
        """counts: pairs per group in the train split."""
        self.settings, self.names = settings, tuple(sorted(counts))
        for name in self.names:
            if counts[name] <= 0:
                raise ConfigError(f'group "{name}" has {counts[name]} training pairs; leave it out')
        if not self.names:
            raise ConfigError("there is no group to train on; give every pair one")
        if settings.reducer != "mean" and len(self.names) < 2:
            raise ConfigError(
                f'all {counts[self.names[0]]} pairs are of group "{self.names[0]}", so reducer = {settings.reducer} '
                "does nothing; use mean or pairs of several groups"
            )
        self.counts = torch.tensor([counts[name] for name in self.names], dtype=torch.float64)
        self.sums = torch.zeros(2, len(self.names), dtype=torch.float64)
        self._log_weights = torch.full((len(self.names),), -math.log(len(self.names)), dtype=torch.float64)

    @property
    def weights(self) -> Tensor:
        """(groups,) float64, sum 1: the share of each group's mean loss in the objective."""
        if self.settings.reducer == "mean":
            return self.counts / self.counts.sum()
        even = torch.full_like(self.counts, 1 / len(self.names))
        if self.settings.reducer == "importance":
            return even
        return (1 - self.settings.chi) * even + self.settings.chi * self._log_weights.exp()

    def ids_of(self, groups: Sequence[str]) -> Tensor:
        """Indices into `names`, int64; InputError for a group that the train split lacks."""
        places = {name: index for index, name in enumerate(self.names)}
        for group in groups:
            if group not in places:
                raise InputError(f'group "{group}" has no training pair; known are {", ".join(self.names)}')
        return torch.tensor([places[group] for group in groups], dtype=torch.int64)

    def reduce(self, per_sample: Tensor, group_ids: Tensor) -> Tensor:
        """One number to minimise: the batch's mean of w_g N / N_g times the loss. Both arguments (samples,)."""
        if self.settings.reducer == "mean":
            return per_sample.mean()
        factors = (self.weights * self._scales).to(per_sample.device, per_sample.dtype)
        return (factors[group_ids] * per_sample).mean()

    def observe(self, per_sample: Tensor, group_ids: Tensor) -> None:
        """Take note of a micro-batch for the next `step`. Training only. Both arguments (samples,)."""
        losses, ids = per_sample.detach().to("cpu", torch.float64), group_ids.cpu()
        self.sums[0].index_add_(0, ids, losses)
        self.sums[1].index_add_(0, ids, torch.ones_like(losses))

    def step(self, sums: Tensor | None = None) -> None:
        """Move the robust weights by what was observed, or by `sums`, those of all ranks together; then forget it.

        sums: (2, groups), each group's sum of losses and number of samples.
        """
        totals, n_seen = (self.sums if sums is None else sums).to("cpu", torch.float64)
        if self.settings.reducer == "robust" and n_seen.sum() > 0:
            if not totals.isfinite().all():
                raise ModelError(f"the losses of the groups sum to {totals.tolist()}; lower learning_rate")
            adjusted = totals + n_seen * self.settings.adjustment / self.counts.sqrt()
            moved = self._log_weights + self.settings.step_size * self._scales * adjusted / n_seen.sum()
            self._log_weights = moved - moved.logsumexp(dim=0)
        self.sums.zero_()

    def state_dict(self) -> State:
        """All that a resumed run needs, as plain lists."""
        return {
            "names": list(self.names),
            "counts": self.counts.tolist(),
            "log_weights": self._log_weights.tolist(),
            "sums": self.sums.tolist(),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on where `state` was taken; ConfigError when it is of other groups."""
        for name, own in (("names", list(self.names)), ("counts", self.counts.tolist())):
            if state[name] != own:
                raise ConfigError(f"the checkpoint's group {name} are {state[name]}, not {own}; start anew")
        self._log_weights = torch.tensor(state["log_weights"], dtype=torch.float64)
        self.sums = torch.tensor(state["sums"], dtype=torch.float64)

    @property
    def _scales(self) -> Tensor:
        """N / N_g."""
        return self.counts.sum() / self.counts


def suggest_step_size(initial_losses: Mapping[str, float]) -> float:
    """An eta for losses of this scale, given each group's mean loss before training."""
    for name, loss in initial_losses.items():
        if not 0 < loss < math.inf:
            raise InputError(f'the first loss of group "{name}" is {loss}; a step size is taken from losses above 0')
    if not initial_losses:
        raise InputError("there are no losses to take a step size from; give every group's")
    return LOG_WEIGHT_PER_STEP * len(initial_losses) / sum(initial_losses.values())
