"""The synthetic study of arXiv 2405.20304, section 5.1: two groups, eight actions, a log-linear policy of four weights.

A context x is drawn from [0, 1]^2. Group 0's features of action a are (c cos(pi x_i), sin(pi x_i) / c) for i = 1, 2
with c = 1 + a / 8; group 1's are the same with each pair swapped, and so are its reward weights. One policy
log pi(a | x, g) ~ features . theta serves both; the reference is uniform. Preferences follow the reward without noise.
Uneven: group 0 compares neighbouring actions, group 1 actions that lie four apart. Imbalanced: 20 % are of group 0.

Every seed is one row of the tensors (seeds, pairs, ...): all are trained together, each with its own GroupReducer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from runtime.alignment.groups import GroupReducer, GroupSettings, Reducer
from runtime.alignment.losses import AnswerLogps, LossSettings, PairLogps, pair_losses

Data = Literal["uneven and imbalanced", "uneven", "imbalanced"]
N_ACTIONS, N_TRAIN, N_VALIDATION = 8, 300, 1000
REWARDS = np.array([[1.0, 3.0, 1.0, 3.0], [3.0, 1.0, 3.0, 1.0]])  # (groups, features)


@dataclass(frozen=True)
class Pairs:
    """features (seeds, pairs, actions, 4), rewards (seeds, pairs, actions), the others (seeds, pairs) int64."""

    features: Tensor
    rewards: Tensor
    chosen: Tensor
    rejected: Tensor
    groups: Tensor

    @classmethod
    def drawn(cls, seeds: Sequence[int], data: Data, n: int, first_share: float) -> Pairs:
        """n pairs for each seed, `first_share` of them of group 0."""
        return cls(*map(torch.stack, zip(*(_draw(seed, data, n, first_share) for seed in seeds), strict=True)))

    def logps(self, theta: Tensor) -> PairLogps:
        """Log-probabilities of all pairs (seeds * pairs,) under theta (seeds, 4)."""
        logps = torch.einsum("spaf,sf->spa", self.features, theta).log_softmax(dim=-1)
        one = torch.ones(self.chosen.numel(), dtype=torch.int64)
        chosen, rejected = (logps.gather(-1, actions[..., None]).flatten() for actions in (self.chosen, self.rejected))
        return PairLogps(AnswerLogps(chosen, one), AnswerLogps(rejected, one))

    def features_of(self, actions: Tensor) -> Tensor:
        """Features of one action per pair, (seeds, pairs, 4)."""
        return self.features.gather(2, actions[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)

    def losses(self, theta: Tensor, settings: LossSettings) -> Tensor:
        """(seeds, pairs); the reference is uniform."""
        uniform = torch.full((self.chosen.numel(),), -math.log(N_ACTIONS), dtype=torch.float64)
        answers = AnswerLogps(uniform, torch.ones_like(uniform))
        found = pair_losses(settings, self.logps(theta), PairLogps(answers, answers))
        return found.per_sample.view(self.chosen.shape)


@dataclass(frozen=True)
class Outcome:
    """Per seed (seeds,), on validation pairs: the worst group's loss, the mean of all groups', the worst group's
    relative reward error of the most likely action; and the hard group's final weight."""

    worst: Tensor
    mean: Tensor
    reward_error: Tensor
    hard_weight: Tensor


def train(seeds: Sequence[int], data: Data, method: Literal["dpo", "ipo"], reducer: Reducer, n_steps: int) -> Outcome:
    """One arm of the study on all seeds, with the paper's constants.

    DPO: beta 1, gradient steps of 0.9, eta 0.5. IPO: beta 0.1, the closed-form best policy for the current group
    weights, eta 0.01. In both the weights move before they are used, as in algorithm 1.
    """
    first_share = 0.5 if data == "uneven" else 0.2
    pairs = Pairs.drawn(seeds, data, N_TRAIN, first_share)
    settings = LossSettings("dpo", beta=1.0) if method == "dpo" else LossSettings("ipo", beta=0.1, length_norm="sum")
    counts = {"0": round(first_share * N_TRAIN), "1": N_TRAIN - round(first_share * N_TRAIN)}
    group_settings = GroupSettings(reducer, step_size=0.5 if method == "dpo" else 0.01)
    reducers = [GroupReducer(group_settings, counts) for _ in seeds]
    starts = [np.random.default_rng([seed, 1]).uniform(0, 5, 4) for seed in seeds]
    theta = torch.tensor(np.array(starts))
    for _ in range(n_steps):
        theta.requires_grad_()
        losses = pairs.losses(theta, settings)
        for each, own, groups in zip(reducers, losses.detach(), pairs.groups, strict=True):
            if reducer == "robust":
                each.observe(own, groups)
                each.step()
        total = _sum(reducers, losses, pairs.groups)
        if method == "ipo":
            (shares,) = torch.autograd.grad(total, losses)
            theta = _best_ipo(pairs, shares, 0.1)
        else:
            (gradient,) = torch.autograd.grad(total, theta)
            theta = theta.detach() - 0.9 * gradient
    hard_weight = torch.stack([each.weights[0] for each in reducers])
    return _outcome(seeds, data, theta.detach(), settings, hard_weight)


def _sum(reducers: Sequence[GroupReducer], losses: Tensor, groups: Tensor) -> Tensor:
    """The seeds' reduced losses added up; each touches its own theta alone."""
    return torch.stack([r.reduce(own, ids) for r, own, ids in zip(reducers, losses, groups, strict=True)]).sum()


def _best_ipo(pairs: Pairs, shares: Tensor, beta: float) -> Tensor:
    """theta (seeds, 4) that minimises the weighted squares; shares (seeds, pairs) are the weights of the pairs."""
    difference = pairs.features_of(pairs.chosen) - pairs.features_of(pairs.rejected)  # h is its product with theta
    weighed = difference * shares[..., None]
    left, right = weighed.transpose(1, 2) @ difference, weighed.sum(dim=1) / (2 * beta)
    return torch.linalg.solve(left, right)


def _outcome(seeds: Sequence[int], data: Data, theta: Tensor, settings: LossSettings, hard_weight: Tensor) -> Outcome:
    """Both groups have as many validation pairs."""
    pairs = Pairs.drawn([seed + 1_000_000 for seed in seeds], data, N_VALIDATION, 0.5)
    losses = pairs.losses(theta, settings)
    picked = torch.einsum("spaf,sf->spa", pairs.features, theta).argmax(dim=-1, keepdim=True)
    got, best = pairs.rewards.gather(-1, picked).squeeze(-1), pairs.rewards.max(dim=-1).values
    by_group, errors = [], []
    for group in (0, 1):
        own = (pairs.groups == group).double()
        by_group.append((losses * own).sum(dim=1) / own.sum(dim=1))
        errors.append(1 - (got * own).sum(dim=1) / (best * own).sum(dim=1))
    stacked = torch.stack(by_group)
    return Outcome(stacked.max(dim=0).values, stacked.mean(dim=0), torch.stack(errors).max(dim=0).values, hard_weight)


def _draw(seed: int, data: Data, n: int, first_share: float) -> tuple[Tensor, ...]:
    rng = np.random.default_rng(seed)
    groups = rng.permutation((np.arange(n) >= round(first_share * n)).astype(np.int64))
    features = _features(rng.uniform(0, 1, (n, 2)), groups)
    rewards = np.einsum("paf,pf->pa", features, REWARDS[groups])
    first = rng.integers(N_ACTIONS, size=n)
    second = _others(rng, first) if data == "imbalanced" else _uneven_others(rng, first, groups)
    rows = np.arange(n)
    is_first_better = rewards[rows, first] > rewards[rows, second]
    chosen, rejected = np.where(is_first_better, first, second), np.where(is_first_better, second, first)
    return tuple(torch.from_numpy(each) for each in (features, rewards, chosen, rejected, groups))


def _features(contexts: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(pairs, actions, 4)."""
    stretch = 1 + np.arange(N_ACTIONS)[None, :, None] / N_ACTIONS
    angles = np.pi * contexts[:, None, :]
    pairs = np.stack((stretch * np.cos(angles), np.sin(angles) / stretch), axis=-1)  # (pairs, actions, 2, 2)
    swapped = np.where(groups[:, None, None, None] == 1, pairs[..., ::-1], pairs)
    return swapped.reshape(len(groups), N_ACTIONS, 4)


def _others(rng: np.random.Generator, first: np.ndarray) -> np.ndarray:
    """Any other action."""
    return (first + rng.integers(1, N_ACTIONS, size=len(first))) % N_ACTIONS


def _uneven_others(rng: np.random.Generator, first: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """A neighbour for group 0, the action four further for group 1."""
    step = rng.choice([-1, 1], size=len(first))
    inside = (first + step >= 0) & (first + step < N_ACTIONS)
    neighbour = np.where(inside, first + step, first - step)
    return np.where(groups == 0, neighbour, (first + N_ACTIONS // 2) % N_ACTIONS)
