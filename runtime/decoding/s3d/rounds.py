"""Rounds of self-speculative decoding: the first and last layers draft some tokens per row, all layers verify them.

Both passes share positions, slots and masks. What the draft pass stores is junk, but for the slots that the verify
pass writes over; slots behind a row's length are hidden until then. So a round needs no memory of its own: a row
drafts no further than it may go, and its slots reach that far.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from runtime.decoding.controller import Controller
from runtime.decoding.s3d.adapter import Drafter, S3DAdapter
from runtime.decoding.s3d.verify import Block, RuleName, Verdict, draft, draft_in_turn, verify
from runtime.decoding.steps import PlainSteps, State
from runtime.errors import ConfigError
from runtime.kv.attention import logits_of, run
from runtime.kv.passes import RowsPass
from runtime.models import LoadedModel

Clock = Callable[[], float]  # seconds
MOST_ACTIVE = 7 / 8  # of the live rows, where those that wait for the others are left out


@dataclass(frozen=True, slots=True)
class S3DDecoding:
    """What drafts, and how many tokens: `k` always, or, where k is None, as many as pay by `clock`.

    What the controller has measured serves all engines that are given the same S3DDecoding.
    """

    adapter: S3DAdapter
    k: int | None = None
    rule: RuleName = "coupled"
    clock: Clock | None = None
    controller: Controller | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.k is None and self.clock is None:
            raise ConfigError("S3D that chooses by itself how much to draft needs a clock; give one or set k")
        if self.k is not None and self.k < 0:
            raise ConfigError(f"S3D with k = {self.k}; use 0 or above")
        self.adapter.check_k(self.k or 0)
        if self.k is None:
            object.__setattr__(self, "controller", Controller(self.adapter.config.k, self.adapter.config.rates))


class S3DRounds:
    """Steps that draft."""

    def __init__(self, policy: LoadedModel, s3d: S3DDecoding, plain: PlainSteps) -> None:
        self.drafter, self.s3d, self.plain = Drafter(policy, s3d.adapter), s3d, plain
        self.k = s3d.adapter.config.k if s3d.k is None else s3d.k
        self.controller = s3d.controller
        self._ended: float | None = None  # when the last round did

    @property
    def n_spare(self) -> int:
        """See Steps."""
        return self.k

    @torch.inference_mode()
    def advance(self, state: State, rooms: Sequence[int]) -> int:
        """See Steps."""
        active = [row for row, room in enumerate(rooms) if room]
        if len(active) > MOST_ACTIVE * len(rooms):  # leaving so few out costs more than it saves
            active = list(range(len(rooms)))
        rooms = [rooms[row] for row in active]
        n_slots = state.arena.n_slots + max(state.arena.prompt_lengths)
        k = min(self._wanted(rooms, n_slots), max(rooms) - 1)
        started = self._now()
        if k == 0 and len(active) == state.arena.n_rows and min(rooms) > 0:
            n_steps = self.plain.advance(state, rooms)
            self._learn(state, (len(active), n_slots, 0), started, n_steps)
            return n_steps
        verdict, index = self._round(state, k, active, [min(k + 1, room) for room in rooms])
        if verdict.lead is not None:
            state.ties.settle_blocks(state.rows, index, verdict.tokens, verdict.lead, verdict.counts)
        state.arena.row_tokens[index] += verdict.counts
        state.rows.append_blocks(index, verdict.tokens, verdict.counts)
        self._report(verdict, k, rooms)
        self._learn(state, (len(active), n_slots, k), started)
        return k + 1

    def _wanted(self, rooms: list[int], n_slots: int) -> int:
        if self.controller is None:
            return self.k
        if self._ended is not None:
            self.controller.gaps.append(self._now() - self._ended)
        return self.controller.choose(rooms, n_slots)

    def _now(self) -> float:
        return self.s3d.clock() if self.controller is not None and self.s3d.clock is not None else 0.0

    def _learn(self, state: State, round_: tuple[int, int, int], started: float, n_rounds: int = 1) -> None:
        """Tell the controller what a round took: rows, slots, drafted tokens."""
        if self.controller is None:
            return
        if state.rows.last.is_cuda:
            torch.cuda.synchronize()
        self._ended = self._now()
        self.controller.observe(*round_, self._ended - started, n_rounds)

    def _round(self, state: State, k: int, active: list[int], limits: list[int]) -> tuple[Verdict, Tensor]:
        """The next tokens of some rows, and which rows these are, (rows,)."""
        rows, rule = state.rows, self.s3d.rule
        allowed = torch.tensor(limits, device=rows.last.device)
        after = (rows.lengths[row] + n for row, n in zip(active, limits, strict=True))
        n_longest = max(*rows.lengths, *after) - 1  # a row's newest token is not stored yet
        counts = None if min(limits) == k + 1 else allowed
        both = RowsPass(state.arena, k + 1, n_longest, counts, active if len(active) < state.arena.n_rows else None)
        index = both.places
        last = rows.last[index]
        seen = rows.seen[index] if state.sampling.repetition_penalty != 1 else None
        with_lead = state.ties.tolerance is not None
        block = Block(rows.keys[index], rows.n_sampled[index], allowed, seen, state.sampling, with_lead)
        fed, drafts = last[:, None], None
        if k:
            hidden = self.drafter.hidden(last, k, both.positions, both)
            if self.drafter.adapter.sampler is None:
                drafts = draft(block, self.drafter.logits(hidden), rule)
            else:
                drafts = draft_in_turn(block, k, partial(self.drafter.logits_after, hidden), rule)
            fed = torch.cat((fed, drafts.tokens.clamp(min=0)), dim=1)
        hidden = run(state.model, fed, both.positions, both)
        return verify(block, drafts, logits_of(state.model, hidden), rule), index

    def _report(self, verdict: Verdict, k: int, rooms: Sequence[int]) -> None:
        """Tell the controller how many drafts stayed."""
        if self.controller is None:
            return
        accepted: list[int] = verdict.accepted.tolist()
        drafted = [min(k, room - 1) for room in rooms]
        reached = [sum(d > place <= a for d, a in zip(drafted, accepted, strict=True)) for place in range(self.k)]
        stayed = [sum(a > place for a in accepted) for place in range(self.k)]
        self.controller.acceptance.observe(reached, stayed)
