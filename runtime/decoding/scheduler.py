"""Which prompt runs next, and what is known about each prompt that runs. Touches no tensor."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from runtime.decoding.rejection import CutPolicy, CutSchedule, PromptCuts
from runtime.records import Candidate, Prompt
from runtime.rewards.protocol import RewardSession

MAX_PREFILL_TOKENS = 4096  # bounds the activations of one prefill


@dataclass(slots=True, eq=False)
class Job:
    """One prompt: its token ids before the run, its candidates as they complete."""

    prompt: Prompt
    prompt_ids: list[int]
    cuts: PromptCuts
    candidates: list[Candidate | None]
    wave: range  # the candidates that are drawn now
    session: RewardSession | None = None
    n_tokens: int = 0  # sampled so far by the slowest of its running rows
    n_reported: dict[int, int] = field(default_factory=dict)  # tokens the session has, per candidate

    @classmethod
    def of(cls, prompt: Prompt, prompt_ids: list[int], n: int, policy: CutPolicy) -> "Job":
        """A job for `n` candidates."""
        wave = range(policy.n_first(n))
        return cls(prompt, prompt_ids, PromptCuts(policy, set(wave)), [None] * n, wave)

    @classmethod
    def failed(cls, prompt: Prompt, n: int, error: str) -> "Job":
        """A job that is complete from the start: every candidate is an error row."""
        job = cls.of(prompt, [], n, CutSchedule())
        job.candidates = [
            Candidate(prompt.prompt_id, index, (), "", "error", status="error", error=error) for index in range(n)
        ]
        return job

    def advance(self) -> None:
        """After a complete wave: the next one if it is worth it, else the rest is marked as not drawn."""
        n, policy = len(self.candidates), self.cuts.policy
        n_more = min(len(self.wave), n - self.wave.stop)
        if n_more and policy.is_worth_more(self.cuts.records, self.cuts.final_scores, n_more):
            self.wave = range(self.wave.stop, self.wave.stop + n_more)
            self.cuts.begin_wave(self.wave)
            self.session, self.n_tokens, self.n_reported = None, 0, {}
            return
        for index in range(self.wave.stop, n):
            self.candidates[index] = Candidate(self.prompt.prompt_id, index, (), "", "skipped")

    def unscored_finished(self) -> list[int]:
        """Competing candidates that finished and have no final score yet."""
        return [
            index
            for index in sorted(self.cuts.competing)
            if self.candidates[index] is not None and index not in self.cuts.final_scores
        ]

    def fail(self, index: int, error: str) -> None:
        """Candidate `index` has no score: if it is complete, it becomes an error row with its text."""
        candidate = self.candidates[index]
        if candidate is not None:
            self.candidates[index] = replace(candidate, status="error", error=error)

    @property
    def is_complete(self) -> bool:
        """True when every candidate is there."""
        return all(candidate is not None for candidate in self.candidates)

    @property
    def is_between_waves(self) -> bool:
        """True when every candidate of the wave is there."""
        return all(self.candidates[index] is not None for index in self.wave)


class Scheduler:
    """First come, first served: a prompt starts when all its rows fit; results leave in input order."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.waiting = deque(job for job in jobs if not job.is_complete)
        self.unreported = deque(jobs)
        self.running: list[Job] = []

    @property
    def has_work(self) -> bool:
        """True while a prompt waits or runs."""
        return bool(self.waiting or self.running)

    def start_next(self, n_free_rows: int, n_free_prompts: int) -> list[Job]:
        """The next waiting prompts that fit; together, padded, at most MAX_PREFILL_TOKENS unless it is one."""
        started: list[Job] = []
        n_longest = 0
        while self.waiting and len(self.waiting[0].wave) <= n_free_rows and len(started) < n_free_prompts:
            n_longest = max(n_longest, len(self.waiting[0].prompt_ids))
            if started and n_longest * (len(started) + 1) > MAX_PREFILL_TOKENS:
                break
            started.append(self.waiting.popleft())
            n_free_rows -= len(started[-1].wave)
        self.running += started
        return started

    @property
    def n_unfinished(self) -> int:
        """Prompts that wait or run."""
        return len(self.waiting) + len(self.running)

    def between_waves(self) -> list[Job]:
        """Running prompts whose wave is complete."""
        return [job for job in self.running if job.is_between_waves]

    def retire(self, jobs: Sequence[Job]) -> bool:
        """Prompts between waves draw the next one, before all others, or are done; True when one is done."""
        for job in jobs:
            self.running.remove(job)
            job.advance()
            if not job.is_complete:
                self.waiting.appendleft(job)
        return any(job.is_complete for job in jobs)

    def results(self) -> Iterator[list[Candidate]]:
        """Complete prompts whose predecessors have been returned."""
        while self.unreported and self.unreported[0].is_complete:
            job = self.unreported.popleft()
            yield [candidate for candidate in job.candidates if candidate is not None]
