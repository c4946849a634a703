"""The decoding loop: prefill a prompt once, step all live rows together, let finished and cut rows leave at once.

The loop owns no policy: memory is the arena's, order the scheduler's, choice of tokens the sampler's, cuts are
`rejection`'s. With counter-based noise a candidate's text is the same for any max_rows, order and cut schedule.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from runtime.decoding.arena import Arena, ArenaShape
from runtime.decoding.attention import ArenaPass, PrefillPass, StepPass, check_window, install
from runtime.decoding.rejection import CutSchedule
from runtime.decoding.rows import RowTable
from runtime.decoding.sampling import SamplingConfig, sample
from runtime.decoding.scheduler import Job, Scheduler
from runtime.errors import ConfigError, InputError, ModelError, PromptTooLong
from runtime.models import LoadedModel, PromptFormat, encode_prompt, stop_ids
from runtime.records import Candidate, FinishReason, Progress, Prompt
from runtime.rewards.protocol import Reward


class Engine:
    """Draws `sampling.n` candidates per prompt with one policy. The policy's model must not be trained meanwhile."""

    def __init__(
        self,
        policy: LoadedModel,
        sampling: SamplingConfig,
        cuts: CutSchedule,
        reward: Reward | None,
        max_rows: int,
        prompt_format: PromptFormat = "chat",
    ) -> None:
        if sampling.n > max_rows:
            raise ConfigError(f"n = {sampling.n} exceeds max_rows = {max_rows}; raise max_rows or lower n")
        if cuts.tokens and reward is None:
            raise ConfigError(f"cuts at {list(cuts.tokens)} tokens need a reward; set one or use no cuts")
        install(policy.model)
        self.policy, self.sampling, self.cuts = policy, sampling, cuts
        self.reward, self.max_rows, self.prompt_format = reward, max_rows, prompt_format
        n_vocabulary = int(policy.model.config.vocab_size)
        self.is_stop = torch.zeros(n_vocabulary, dtype=torch.bool, device=policy.model.device)
        self.is_stop[[token for token in stop_ids(policy) if token < n_vocabulary]] = True

    def generate(self, prompts: Sequence[Prompt], on_progress: Progress | None = None) -> Iterator[list[Candidate]]:
        """One list of n candidates (by candidate_index) per prompt, in input order, as soon as it is complete.

        A prompt that cannot be decoded yields n error rows. `on_progress` counts prompts. Errors that concern the
        whole run are raised here, before anything is decoded.
        """
        jobs = [self._job(prompt) for prompt in prompts]
        longest = max((len(job.prompt_ids) for job in jobs if job.prompt_ids), default=0)
        n_slots = longest + self.sampling.max_new_tokens
        check_window(self.policy.model.config, n_slots)
        n_rows = min(self.max_rows, self.sampling.n * sum(1 for job in jobs if job.prompt_ids))
        return _Run(self, jobs, n_rows, n_slots).results(on_progress)

    def _job(self, prompt: Prompt) -> Job:
        try:
            token_ids = encode_prompt(self.policy.tokenizer, prompt.messages, self.prompt_format)
            self._check_length(len(token_ids))
        except InputError as error:
            return Job.failed(prompt, self.sampling.n, str(error))
        return Job.of(prompt, token_ids, self.sampling.n, self.cuts)

    def _check_length(self, n_prompt: int) -> None:
        n_new, limit = self.sampling.max_new_tokens, int(self.policy.model.config.max_position_embeddings)
        if n_prompt == 0:
            raise InputError("the prompt has no tokens")
        if n_prompt + n_new > limit:
            raise PromptTooLong(
                f"prompt of {n_prompt} tokens + max_new_tokens = {n_new} exceeds the context of {limit} tokens"
            )


class _Run:
    """One call of `generate`."""

    def __init__(self, engine: Engine, jobs: Sequence[Job], n_rows: int, n_slots: int) -> None:
        model = engine.policy.model
        self.engine, self.sampling, self.model = engine, engine.sampling, model
        self.n_jobs = len(jobs)
        self.scheduler = Scheduler(jobs)
        self.arena = Arena(ArenaShape.of(model, n_rows, n_slots), model.dtype, model.device)
        self.rows = RowTable(n_rows, self.sampling.max_new_tokens, model.device)

    def results(self, on_progress: Progress | None) -> Iterator[list[Candidate]]:
        """The loop."""
        yield from self.scheduler.results()
        while self.scheduler.has_work:
            jobs = self.scheduler.start_next(self.arena.n_free)
            if jobs:
                self._prefill(jobs)
            else:
                self._step()
            if self._settle() and on_progress is not None:
                on_progress(self.n_jobs - self.scheduler.n_unfinished, self.n_jobs)
            yield from self.scheduler.results()

    @torch.inference_mode()
    def _prefill(self, jobs: Sequence[Job]) -> None:
        """Run each prompt through the model once and sample the first token of each of its candidates."""
        n, device = self.sampling.n, self.model.device
        first = self.arena.n_live
        for job in jobs:
            self.rows.add(job, self.arena.take(n), self.sampling.seed)
            if self.engine.reward is not None and job.cuts.schedule.tokens:
                job.session = self.engine.reward.start([job.prompt] * n)
            job.n_tokens = 1
        rows = slice(first, self.arena.n_live)
        lengths = torch.tensor([len(job.prompt_ids) for job in jobs], device=device)
        padded = [torch.tensor(job.prompt_ids, device=device) for job in jobs]
        token_ids = torch.nn.utils.rnn.pad_sequence(padded, batch_first=True)
        positions = torch.arange(token_ids.shape[1], device=device)[None]
        hidden = self._forward(token_ids, positions, PrefillPass(self.arena, rows, len(jobs)))
        last = hidden[torch.arange(len(jobs), device=device), lengths - 1]
        self._sample(rows, self._logits(last).repeat_interleave(n, dim=0))

    @torch.inference_mode()
    def _step(self) -> None:
        """One more token for every live row."""
        live = slice(0, self.arena.n_live)
        lengths = self.rows.lengths[live]
        step = StepPass(self.arena, lengths)
        hidden = self._forward(self.rows.last[live, None], lengths[:, None], step)
        lengths += 1
        self._sample(live, self._logits(hidden[:, 0]))
        for job in self.scheduler.running:
            job.n_tokens += 1

    def _forward(self, token_ids: Tensor, positions: Tensor, arena_pass: ArenaPass) -> Tensor:
        """Last hidden states, (rows, tokens, width)."""
        output = self.model.base_model(
            input_ids=token_ids,
            position_ids=positions.expand_as(token_ids),
            attention_mask=arena_pass.mask,
            use_cache=False,
            arena_pass=arena_pass,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        """(rows, width) -> (rows, vocabulary); every supported architecture ends in this one linear layer."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)  # type: ignore[no-untyped-call]
        if not bool(logits.amax(-1).isfinite().all()):
            raise ModelError(f"the policy computes logits that are not finite in {self.model.dtype}; use float32")
        return logits

    def _sample(self, rows: slice, logits: Tensor) -> None:
        tokens = sample(logits, self.rows.keys[rows], self.rows.n_sampled[rows], self.sampling)
        self.rows.append(rows, tokens)

    def _settle(self) -> bool:
        """Let finished and cut rows leave. True when a prompt became complete."""
        n_live = self.arena.n_live
        at_stop = self.engine.is_stop[self.rows.last[:n_live]]
        is_done = at_stop | (self.rows.n_sampled[:n_live] >= self.sampling.max_new_tokens)
        leaving: set[int] = set(is_done.nonzero().flatten().tolist())
        for row in leaving:
            self._close(row, "eos" if at_stop[row] else "length")
        for job in self.scheduler.running:
            if job.n_tokens == job.cuts.next_tokens:
                leaving |= self._cut(job, leaving)
        if not leaving:
            return False
        self.rows.apply(self.arena.release(leaving, self.rows.longest(n_live)))
        self.rows.shrink(self.arena.n_live)
        return self.scheduler.retire()

    def _cut(self, job: Job, leaving: set[int]) -> set[int]:
        """Apply the next cut of `job`; the rows that leave. `leaving` are those that finished in this step."""
        row_of = {
            owner.candidate_index: row
            for row, owner in enumerate(self.rows.owners)
            if owner.job is job and row not in leaving and owner.candidate_index in job.cuts.competing
        }
        if not row_of:
            job.cuts.skip()
            return set()
        partial, failed = self._partial_scores(job, row_of)
        for index, error in failed.items():
            self._close(row_of[index], "error", error)
        dropped = job.cuts.cut(partial)
        for index in dropped:
            self._close(row_of[index], "cut")
        if job.session is not None:
            job.session.keep(sorted(job.cuts.competing))
        return {row_of[index] for index in [*failed, *dropped]}

    def _partial_scores(self, job: Job, row_of: dict[int, int]) -> tuple[dict[int, float], dict[int, str]]:
        """Scores of the running candidates and errors of those that have none; finished ones go to `job.cuts`."""
        assert job.session is not None
        sampled = {index: self.rows.sampled(row) for index, row in row_of.items()}
        texts = dict(zip(sampled, self._decode(list(sampled.values())), strict=True))
        for index in job.unscored_finished():
            candidate = job.candidates[index]
            assert candidate is not None
            sampled[index], texts[index] = list(candidate.token_ids), candidate.response
        indices = sorted(sampled)
        new_ids = [sampled[index][job.n_reported.get(index, 0) :] for index in indices]
        job.session.extend(indices, new_ids, [texts[index] for index in indices])
        job.n_reported.update({index: len(sampled[index]) for index in indices})
        partial: dict[int, float] = {}
        failed: dict[int, str] = {}
        for index, score in zip(indices, job.session.scores(indices), strict=True):
            if score.value is None:
                error = score.error or "the reward gave no score"
                job.fail(index, error)
                if index in row_of:
                    failed[index] = error
            elif index in row_of:
                partial[index] = score.value
            else:
                job.cuts.final_scores[index] = score.value
        return partial, failed

    def _close(self, row: int, reason: FinishReason, error: str | None = None) -> None:
        """Turn `row` into a candidate of its prompt."""
        owner = self.rows.owners[row]
        job, index = owner.job, owner.candidate_index
        token_ids = self.rows.sampled(row)
        job.candidates[index] = Candidate(
            prompt_id=job.prompt.prompt_id,
            candidate_index=index,
            token_ids=tuple(token_ids),
            response=self._decode([token_ids[:-1] if reason == "eos" else token_ids])[0],
            finish_reason=reason,
            cut_at_token=len(token_ids) if reason == "cut" else None,
            cuts=tuple(job.cuts.records.get(index, ())),
            status="error" if error else "ok",
            error=error,
        )

    def _decode(self, token_ids: list[list[int]]) -> list[str]:
        texts: list[str] = self.engine.policy.tokenizer.batch_decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return texts
