"""Figures per group from sums over samples, so that batches and processes can be added up."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from runtime.alignment.losses import Losses

ALL = ""  # the name that stands for all groups together
# Of these, the worst group is the one with the smallest value; of a loss the one with the largest.
HIGHER_IS_BETTER = ("rewards/accuracies", "rewards/margins", "truth", "reward")
Figures = dict[str, dict[str, float]]


class GroupSums:
    """Sums and counts per group of the losses and metrics of some batches."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.metrics: tuple[str, ...] = ()
        self.sums: Tensor | None = None  # (groups, 1 + metrics), the first column counts

    def add(self, losses: Losses, group_ids: Tensor, is_counted: bool = True) -> None:
        """Another batch; one that is not counted only says which metrics there are."""
        self.metrics = ("loss", *losses.metrics)
        columns = [losses.per_sample.detach(), *losses.metrics.values()]
        rows = torch.stack([torch.ones_like(columns[0]), *columns], dim=1).double()  # (samples, 1 + metrics)
        if self.sums is None:
            self.sums = torch.zeros(len(self.names), rows.shape[1], dtype=torch.float64, device=rows.device)
        if is_counted:
            self.sums.index_add_(0, group_ids.to(rows.device), rows)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added."""
        return self.sums is None

    def figures(self, over_processes: Callable[[Tensor], Tensor]) -> Figures:
        """Means per group that has samples, and over all of them (ALL), each with `pairs`; then all is forgotten."""
        assert self.sums is not None, "nothing was added"
        sums = over_processes(self.sums).cpu()
        self.sums = None
        found = {ALL: self._means(sums.sum(dim=0))}
        found |= {name: self._means(row) for name, row in zip(self.names, sums, strict=True) if row[0] > 0}
        return found

    def _means(self, row: Tensor) -> dict[str, float]:
        values = (row[1:] / row[0]).tolist()
        return {"pairs": int(row[0]), **dict(zip(self.metrics, values, strict=True))}


def by_name(figures: Figures) -> dict[str, float]:
    """Under the names that they are reported by: METRIC of all samples, groups/GROUP/METRIC of a group."""
    return {
        f"groups/{name}/{metric}" if name else metric: value
        for name, values in figures.items()
        for metric, value in values.items()
        if metric != "pairs"
    }


def known_means(values: Mapping[str, tuple[Tensor, Tensor]], groups: Sequence[str]) -> Figures:
    """Means over all samples (ALL) and per group of metrics that are not known of every sample.

    values: per metric (samples,), and whether it is known (samples,); a group of which it never is has no mean.
    """
    found: Figures = {ALL: {}}
    members = {ALL: torch.ones(len(groups), dtype=torch.bool)}
    members |= {name: torch.tensor([group == name for group in groups]) for name in sorted(set(groups))}
    for metric, (on_device, is_known) in values.items():
        numbers, counted = on_device.detach().cpu().double(), is_known.cpu()
        for name, is_member in members.items():
            if bool((counted & is_member).any()):
                found.setdefault(name, {})[metric] = float(numbers[counted & is_member].mean())
    return found


def extremes(figures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """worst/METRIC and gap/METRIC (largest less least) over the groups, of loss, accuracy, margin, truth, reward."""
    groups = [values for name, values in figures.items() if name != ALL]
    found: dict[str, float] = {}
    for metric in ("loss", *HIGHER_IS_BETTER):
        values = [group[metric] for group in groups if metric in group]
        if values:
            found[f"worst/{metric}"] = min(values) if metric in HIGHER_IS_BETTER else max(values)
            found[f"gap/{metric}"] = max(values) - min(values)
    return found
