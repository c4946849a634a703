"""How far partial scores can be trusted: measured on finished candidates, turned into a schedule.

The input is plain Best-of-N whose answers were also scored at several token counts without cutting anyone. Any schedule
can then be replayed on it exactly: what it would have decoded, and whom it would have kept.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from runtime.decoding.adaptive import Fit
from runtime.decoding.rejection import keep_count, rank
from runtime.errors import InputError

KEEPS = (0.5, 0.25, 0.1)  # fractions for which the winner's survival is reported
GRID_KEEPS = (0.1, 0.15, 0.25, 0.35, 0.5, 0.7)  # fractions that a proposed schedule may have
MAX_CUTS = 3
MIN_RUNNING = 4  # below so many answers that still run, a prompt says nothing about a token count


@dataclass(frozen=True, slots=True)
class Trace:
    """One finished answer: its length, final score and partial scores by token count (up to its length)."""

    n_tokens: int
    score: float
    partial: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Point:
    """What partial scores at one token count say; means over the prompts where enough answers still run."""

    n_tokens: int
    n_prompts: int
    pearson: float
    kendall: float
    winner_survives: Mapping[float, float]  # by keep fraction
    fit: Fit | None  # None where partial scores predict nothing


@dataclass(frozen=True, slots=True)
class Proposal:
    """A schedule and what it would have done to the calibration's prompts."""

    tokens: tuple[int, ...]
    keep: tuple[float, ...]
    token_share: float  # of plain Best-of-N
    gain_retained: float  # of the best score over the mean one


def measure(prompts: Sequence[Sequence[Trace]], token_counts: Sequence[int]) -> list[Point]:
    """One point per token count at which some prompt still has MIN_RUNNING answers running."""
    points = (_point(prompts, n_tokens) for n_tokens in token_counts)
    return [point for point in points if point is not None]


def replay(prompts: Sequence[Sequence[Trace]], tokens: Sequence[int], keep: Sequence[float]) -> tuple[float, float]:
    """(share of tokens, share of gain retained) of a schedule, over all prompts."""
    n_used = n_full = 0
    gain = full_gain = 0.0
    for traces in prompts:
        used = [trace.n_tokens for trace in traces]
        alive = set(range(len(traces)))
        for n_tokens, fraction in zip(tokens, keep, strict=True):
            running = {i for i in alive if n_tokens in traces[i].partial}
            if not running:
                continue
            scores = {i: traces[i].partial[n_tokens] if i in running else traces[i].score for i in alive}
            alive = set(rank(scores)[: keep_count(len(scores), fraction)])
            for i in running - alive:
                used[i] = n_tokens
        n_used, n_full = n_used + sum(used), n_full + sum(trace.n_tokens for trace in traces)
        mean = statistics.fmean(trace.score for trace in traces)
        gain += max(traces[i].score for i in alive) - mean
        full_gain += max(trace.score for trace in traces) - mean
    return n_used / n_full, gain / full_gain if full_gain > 0 else 1.0


def propose(prompts: Sequence[Sequence[Trace]], token_counts: Sequence[int], retained: float = 0.99) -> Proposal:
    """A cheap schedule of up to MAX_CUTS cuts that keeps `retained` of the gain on parts of these prompts.

    Parts: a quarter of a prompt's answers at a time, because the gain is easily kept on what the search has seen, and
    four small draws show more of what may go wrong than a large one. A greedy search: the cut that saves most is added,
    or one of the present ones changed or removed, as long as that saves tokens. InputError when there is nothing to
    measure on.
    """
    if not any(len(traces) > 1 for traces in prompts):
        raise InputError("a calibration needs prompts with at least two finished, scored answers")
    parts = [part for traces in prompts for part in _quarters(traces)]
    choices = list(itertools.product(token_counts, GRID_KEEPS))
    cuts: dict[int, float] = {}
    found = Proposal((), (), 1.0, 1.0)
    while True:
        bases = [cuts, *({at: keep for at, keep in cuts.items() if at != gone} for gone in cuts)]
        changed = [base | {at: keep} for base in bases for at, keep in choices if at not in base]
        best = found
        for candidate in changed:
            tokens = tuple(sorted(candidate))
            keeps = tuple(candidate[at] for at in tokens)
            if len(tokens) <= MAX_CUTS:
                share, gain = replay(parts, tokens, keeps)
                if gain >= retained and share < best.token_share - 1e-9:
                    best = Proposal(tokens, keeps, share, gain)
        if best is found:
            return Proposal(found.tokens, found.keep, *replay(prompts, found.tokens, found.keep))
        found, cuts = best, dict(zip(best.tokens, best.keep, strict=True))


def _quarters(traces: Sequence[Trace]) -> list[Sequence[Trace]]:
    """Four parts of some answers, or all of them where a part would have fewer than MIN_RUNNING."""
    return [traces[start::4] for start in range(4)] if len(traces) >= 4 * MIN_RUNNING else [traces]


def _point(prompts: Sequence[Sequence[Trace]], n_tokens: int) -> Point | None:
    pearson, kendall = [], []
    survives: dict[float, list[float]] = {keep: [] for keep in KEEPS}
    partial_scores: list[float] = []
    final_scores: list[float] = []
    for traces in prompts:
        running = {i: trace.partial[n_tokens] for i, trace in enumerate(traces) if n_tokens in trace.partial}
        if len(running) < MIN_RUNNING:
            continue
        partial = torch.tensor(list(running.values()), dtype=torch.float64)
        final = torch.tensor([traces[i].score for i in running], dtype=torch.float64)
        partial_scores += partial.tolist()
        final_scores += final.tolist()
        if partial.std() > 0 and final.std() > 0:
            pearson.append(float(torch.corrcoef(torch.stack((partial, final)))[0, 1]))
            kendall.append(_kendall(partial, final))
        finished = {i: trace.score for i, trace in enumerate(traces) if i not in running}
        ranked = rank({**finished, **running})
        winner = rank({i: trace.score for i, trace in enumerate(traces)})[0]
        for keep in KEEPS:
            survives[keep].append(float(winner in ranked[: keep_count(len(ranked), keep)]))
    if not partial_scores:
        return None
    return Point(
        n_tokens,
        len(survives[KEEPS[0]]),
        statistics.fmean(pearson) if pearson else 0.0,
        statistics.fmean(kendall) if kendall else 0.0,
        {keep: statistics.fmean(values) for keep, values in survives.items()},
        _fit(n_tokens, partial_scores, final_scores),
    )


def _fit(n_tokens: int, partial: Sequence[float], final: Sequence[float]) -> Fit | None:
    x, y = torch.tensor(partial, dtype=torch.float64), torch.tensor(final, dtype=torch.float64)
    spread = float(x.var(correction=0))
    slope = float(((x - x.mean()) * (y - y.mean())).mean()) / spread if spread > 0 else 0.0
    if slope <= 0:
        return None
    intercept = float(y.mean()) - slope * float(x.mean())
    # Partial scores that predict exactly would make every later doubt impossible.
    residual = max(float((y - intercept - slope * x).std(correction=0)), 1e-6 * float(y.std(correction=0)))
    return Fit(n_tokens, intercept, slope, residual)


def _kendall(x: torch.Tensor, y: torch.Tensor) -> float:
    """Kendall's tau-b."""
    a, b = torch.sign(x[:, None] - x[None]), torch.sign(y[:, None] - y[None])
    return float((a * b).sum() / (a.abs().sum() * b.abs().sum()).sqrt())
