"""Order of prompts, without a model."""

from dataclasses import replace

import pytest

from runtime.decoding import scheduler
from runtime.decoding.rejection import CutSchedule
from runtime.decoding.scheduler import Job, Scheduler
from runtime.records import Candidate, Message, Prompt


def job(name: str, n_tokens: int = 3, n: int = 2) -> Job:
    return Job.of(Prompt(name, (Message("user", name),), "g"), [7] * n_tokens, n, CutSchedule())


def complete(done: Job) -> None:
    done.candidates = [Candidate(done.prompt.prompt_id, index, (), "", "eos") for index in range(len(done.candidates))]


def test_prompts_start_in_order_while_their_rows_fit() -> None:
    jobs = [job(name) for name in "abc"]
    order = Scheduler(jobs)
    assert order.start_next(5, 100) == jobs[:2]
    assert order.start_next(1, 100) == []
    assert order.start_next(2, 100) == jobs[2:]
    assert order.start_next(9, 100) == []


def test_prefill_is_bounded_but_never_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MAX_PREFILL_TOKENS", 10)
    jobs = [job("a", 4), job("b", 5), job("c", 4), job("d", 11)]
    order = Scheduler(jobs)
    assert [order.start_next(99, 100) for _ in range(4)] == [jobs[:2], [jobs[2]], [jobs[3]], []]


def test_results_wait_for_their_predecessors() -> None:
    jobs = [job("a"), Job.failed(replace(job("b").prompt), 2, "too long"), job("c")]
    order = Scheduler(jobs)
    order.start_next(99, 100)
    complete(jobs[2])
    assert order.retire(order.between_waves()) and list(order.results()) == [] and order.n_unfinished == 1
    complete(jobs[0])
    assert order.retire(order.between_waves()) and not order.has_work
    assert [found[0].prompt_id for found in order.results()] == ["a", "b", "c"]
