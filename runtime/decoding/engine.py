"""The decoding loop: prefill a prompt once, step all live rows together, let finished and cut rows leave at once.

The loop owns no policy: memory is the arena's, order the scheduler's, choice of tokens the sampler's, how many of them
at once is for the steps to say, cuts are `rejection`'s. With counter-based noise a candidate's text is the same for
any max_rows, order, steps and cut schedule.
"""

from collections.abc import Iterator, Sequence

import torch

from runtime.decoding.budget import Costs, ElasticCosts
from runtime.decoding.rejection import CutPolicy, MemoryCuts
from runtime.decoding.rows import RowTable
from runtime.decoding.s3d.rounds import S3DDecoding, S3DRounds
from runtime.decoding.sampling import SamplingConfig
from runtime.decoding.scheduler import Job, Scheduler
from runtime.decoding.steps import PlainSteps, State, Steps
from runtime.decoding.ties import Ties
from runtime.errors import ConfigError, InputError, ModelError, PromptTooLong
from runtime.kv.arena import Arena, ArenaSize, KVShape
from runtime.kv.attention import install, logits_of, run
from runtime.kv.passes import PrefillPass
from runtime.models import LoadedModel, PromptFormat, encode_prompt, stop_ids
from runtime.records import Candidate, FinishReason, Progress, Prompt
from runtime.rewards.protocol import RescoringSession, Reward, RewardSession


class Engine:
    """Draws `sampling.n` candidates per prompt with one policy. The policy's model must not be trained meanwhile."""

    def __init__(
        self,
        policy: LoadedModel,
        sampling: SamplingConfig,
        cuts: CutPolicy,
        reward: Reward | None,
        max_rows: int,
        prompt_format: PromptFormat = "chat",
        kv_budget: int | None = None,
        settle_every: int | None = None,
        s3d: S3DDecoding | None = None,
    ) -> None:
        """kv_budget: bytes that the keys and values of policy and reward may take together; None: no bound.

        settle_every: steps after which finished rows leave at the latest. Asking a GPU who has finished makes it wait,
        so it is asked seldom; what was decoded behind an end is dropped. None: 1 on a CPU, 8 on a GPU.

        s3d: drafts several tokens at once. It changes no text, only how fast it comes.
        """
        if isinstance(cuts, MemoryCuts) and kv_budget is None:
            raise ConfigError("cuts when memory is full need a kv_budget; set one or use a schedule")
        if sampling.n > max_rows:
            raise ConfigError(f"n = {sampling.n} exceeds max_rows = {max_rows}; raise max_rows or lower n")
        if cuts.is_cutting and reward is None:
            raise ConfigError("cuts compare rewards of partial answers; set a reward or use no cuts")
        install(policy.model)
        self.policy, self.sampling, self.cuts = policy, sampling, cuts
        self.reward, self.max_rows, self.prompt_format, self.kv_budget = reward, max_rows, prompt_format, kv_budget
        plain = PlainSteps(settle_every or (1 if policy.model.device.type == "cpu" else 8))
        self.steps: Steps = plain if s3d is None else S3DRounds(policy, s3d, plain)
        n_vocabulary = int(policy.model.config.vocab_size)
        self.is_stop = torch.zeros(n_vocabulary, dtype=torch.bool, device=policy.model.device)
        self.is_stop[[token for token in stop_ids(policy) if token < n_vocabulary]] = True

    def generate(self, prompts: Sequence[Prompt], on_progress: Progress | None = None) -> Iterator[list[Candidate]]:
        """One list of n candidates (by candidate_index) per prompt, in input order, as soon as it is complete.

        A prompt that cannot be decoded yields n error rows. `on_progress` counts prompts. Errors that concern the
        whole run are raised here, before anything is decoded.
        """
        jobs = [self._job(prompt) for prompt in prompts]
        return _Run(self, jobs, self._plan(jobs)).results(on_progress)

    def _plan(self, jobs: Sequence[Job]) -> ArenaSize:
        return self._costs().plan([len(job.prompt_ids) for job in jobs if not job.is_complete], self.max_rows)

    @property
    def cuts_when_full(self) -> bool:
        """Whether memory, not a token count, says when to cut."""
        return isinstance(self.cuts, MemoryCuts) and self.cuts.is_cutting

    def open_session(self, job: Job) -> RewardSession:
        """What scores the partial answers of a prompt; where memory is what is short, it keeps texts only."""
        assert self.reward is not None
        prompts = [job.prompt] * len(job.candidates)
        if self.cuts_when_full and self.reward.kv_bytes_per_token:
            return RescoringSession(self.reward, prompts)
        return self.reward.start(prompts)

    def _costs(self) -> Costs:
        model = self.policy.model
        per_token = KVShape.of(model).n_bytes(1, model.dtype)
        keeps_rewards = self.reward is not None and self.cuts.is_cutting and not self.cuts_when_full
        per_reward_token = self.reward.kv_bytes_per_token if self.reward is not None and keeps_rewards else 0
        n_survivors = self.cuts.n_survivors(self.sampling.n)
        kind = ElasticCosts if self.cuts_when_full else Costs
        n_scored = max(self.cuts.tokens, default=0)
        return kind(self.sampling, n_survivors, per_token, per_reward_token, n_scored, self.kv_budget)

    def _job(self, prompt: Prompt) -> Job:
        try:
            token_ids = encode_prompt(self.policy.tokenizer, prompt.messages, self.prompt_format)
            self._check_length(len(token_ids))
            self._costs().check(len(token_ids))
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

    def __init__(self, engine: Engine, jobs: Sequence[Job], size: ArenaSize) -> None:
        model = engine.policy.model
        self.engine, self.sampling, self.model, self.steps = engine, engine.sampling, model, engine.steps
        self.n_jobs = len(jobs)
        self.scheduler = Scheduler(jobs)
        self.arena = Arena(KVShape.of(model), size, model.dtype, model.device)
        n_seen = int(model.config.vocab_size) if self.sampling.repetition_penalty != 1 else 0
        n_places = self.sampling.max_new_tokens + self.steps.n_spare
        self.rows = RowTable(size.n_rows, n_places, n_seen, model.device)
        self.state = State(model, self.sampling, self.arena, self.rows, Ties(model, self.sampling))

    def results(self, on_progress: Progress | None) -> Iterator[list[Candidate]]:
        """The loop."""
        yield from self.scheduler.results()
        while self.scheduler.has_work:
            jobs = self.scheduler.start_next(self.arena.n_free_rows, self.arena.n_free_prompts)
            n_most = self._prefill(jobs) if jobs else self.steps.advance(self.state, self._rooms())
            if self._settle(n_most) and on_progress is not None:
                on_progress(self.n_jobs - self.scheduler.n_unfinished, self.n_jobs)
            yield from self.scheduler.results()

    def _rooms(self) -> list[int]:
        """How many tokens each row may go on until it is at full length or its prompt may have to be cut.

        Cuts compare answers of equal length: whoever comes first waits for the others.
        """
        bounds = {job: self._bound(job) for job in self.scheduler.running}
        return [bounds[owner.job] - n for owner, n in zip(self.rows.owners, self.rows.lengths, strict=True)]

    def _bound(self, job: Job) -> int:
        most, cut = self.sampling.max_new_tokens, job.cuts.next_tokens
        if self.engine.cuts_when_full:
            return min(most, self.arena.full_at(self.arena.n_rows, job.n_tokens))
        return most if cut is None or cut <= job.n_tokens else min(most, cut)

    @torch.inference_mode()
    def _prefill(self, jobs: Sequence[Job]) -> int:
        """Run each prompt through the model once and sample the first token of each of its candidates."""
        device = self.model.device
        first_row, first_prompt = self.arena.n_rows, self.arena.n_prompts
        for job in jobs:
            self.rows.add(job, self.arena.add(len(job.prompt_ids), len(job.wave)), self.sampling.seed)
            if self.engine.reward is not None and job.cuts.policy.is_cutting:
                job.session = self.engine.open_session(job)
        lengths = torch.tensor([len(job.prompt_ids) for job in jobs], device=device)
        padded = [torch.tensor(job.prompt_ids, device=device) for job in jobs]
        token_ids = torch.nn.utils.rnn.pad_sequence(padded, batch_first=True)
        positions = torch.arange(token_ids.shape[1], device=device).expand_as(token_ids)
        prefill = PrefillPass(self.arena, slice(first_prompt, self.arena.n_prompts))
        hidden = run(self.model, token_ids, positions, prefill)
        last = hidden[torch.arange(len(jobs), device=device), lengths - 1]
        n_rows = torch.tensor([len(job.wave) for job in jobs], device=device)
        logits = logits_of(self.model, last).repeat_interleave(n_rows, dim=0)
        self.state.sample(slice(first_row, self.arena.n_rows), logits)
        return 1

    @torch.inference_mode()
    def _settle(self, n_most: int) -> bool:
        """Let rows leave that finished in their newest tokens, `n_most` at most, or are cut. True when a prompt became
        complete."""
        n_live = self.arena.n_rows
        leaving = self._finished(n_live, n_most)
        least: dict[Job, int] = {}
        for row, (owner, n_tokens) in enumerate(zip(self.rows.owners, self.rows.lengths, strict=True)):
            if row not in leaving:
                least[owner.job] = min(n_tokens, least.get(owner.job, n_tokens))
        for job, n_tokens in least.items():
            job.n_tokens = n_tokens
        for row, reason in leaving.items():
            self._close(row, reason)
        gone = set(leaving)
        for job in self.scheduler.running:
            while self._is_due(job, n_live - len(gone)):
                gone |= self._cut(job, gone)
        if not gone:
            return False
        self.rows.apply(self.arena.release(gone, max(self.rows.lengths)))
        self.rows.shrink(self.arena.n_rows)
        paused = self.scheduler.between_waves()
        for job in paused:
            if job.wave.stop < len(job.candidates):
                self._partial_scores(job, {})
        return self.scheduler.retire(paused)

    def _is_due(self, job: Job, n_live: int) -> bool:
        """Whether `job` must be cut now: at a token count of its policy, or because the next token would not fit."""
        if self.engine.cuts_when_full:
            return n_live > self.arena.n_rows_with(job.n_tokens)
        return job.n_tokens == job.cuts.next_tokens

    def _finished(self, n_live: int, n_most: int) -> dict[int, FinishReason]:
        """Rows that finished in their newest tokens; what they sampled behind their end is dropped."""
        newest, is_new = self.rows.newest(n_live, n_most)
        ends = self.engine.is_stop[newest] & is_new
        n_before = self.rows.n_settled[:n_live] + ends.long().argmax(1) + 1
        n_sampled = torch.where(ends.any(1), n_before, self.rows.n_sampled[:n_live])
        is_broken = ((newest < 0) & is_new).any(1)
        # One question to the device.
        lengths, has_end, broken = torch.stack((n_sampled, ends.any(1), is_broken)).tolist()
        if any(broken):
            raise ModelError(f"the policy computes logits that are not finite in {self.model.dtype}; use float32")
        stops = self._at_stop_string(lengths)
        leaving: dict[int, FinishReason] = {
            row: "length" for row in range(n_live) if lengths[row] == self.sampling.max_new_tokens
        }
        leaving |= {row: "eos" for row in range(n_live) if has_end[row]}
        for row, n_tokens in stops.items():
            if not has_end[row] or n_tokens < lengths[row]:
                leaving[row], lengths[row] = "stop", n_tokens
        self.rows.settle(lengths)
        return leaving

    def _at_stop_string(self, lengths: list[int]) -> dict[int, int]:
        """Rows whose text holds a stop string behind one of their newest tokens, and their tokens by then."""
        if not self.sampling.stop:
            return {}
        # Every character has at most four bytes, and so at most four tokens.
        n_tail = 4 * max(map(len, self.sampling.stop))
        ids: list[list[int]] = self.rows.tokens[: len(lengths)].tolist()
        places = [
            (row, n)
            for row, (old, new) in enumerate(zip(self.rows.lengths, lengths, strict=True))
            for n in range(old + 1, new + 1)
        ]
        texts = self._decode([ids[row][max(0, n - n_tail) : n] for row, n in places])
        found: dict[int, int] = {}
        for (row, n), text in zip(places, texts, strict=True):
            if any(stop in text for stop in self.sampling.stop):
                found.setdefault(row, n)
        return found

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
        dropped = job.cuts.cut(job.n_tokens, partial)
        for index in dropped:
            self._close(row_of[index], "cut")
        if job.session is not None:
            job.session.keep(sorted(job.cuts.competing - job.cuts.final_scores.keys()))
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
            response=self._response(token_ids, reason),
            finish_reason=reason,
            cut_at_token=len(token_ids) if reason == "cut" else None,
            cuts=tuple(job.cuts.records.get(index, ())),
            status="error" if error else "ok",
            error=error,
        )

    def _response(self, token_ids: list[int], reason: FinishReason) -> str:
        text = self._decode([token_ids[:-1] if reason == "eos" else token_ids])[0]
        # An end token may arrive with the stop string still in front of it.
        places = [place for stop in self.sampling.stop if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else text

    def _decode(self, token_ids: list[list[int]]) -> list[str]:
        if not token_ids:  # transformers would decode no rows into one empty text
            return []
        texts: list[str] = self.engine.policy.tokenizer.batch_decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return texts
