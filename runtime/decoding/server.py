"""Best-of-N with cuts on an OpenAI-compatible completions server (vLLM, SGLang, llama.cpp, `transformers serve`).

The policies are those of the engine. Between two cuts every answer is continued by one request that sends prompt and
answer so far; a server with a prefix cache computes only what is new. What the server draws is up to it: a seed goes
along with every request, but texts are reproducible only as far as the server's are.
"""

import asyncio
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import PreTrainedTokenizerBase

from runtime.decoding.rejection import CutPolicy, MemoryCuts
from runtime.decoding.sampling import SamplingConfig
from runtime.decoding.scheduler import Job
from runtime.errors import ConfigError, InputError, UnreachableError
from runtime.models import PromptFormat, render_prompt
from runtime.randomness import row_key
from runtime.records import Candidate, FinishReason, Progress, Prompt
from runtime.rewards.protocol import Reward

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_BEYOND = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Server:
    """Where the policy is served; `url` ends in /v1."""

    url: str
    model: str
    concurrency: int = 16
    timeout: float = 120.0  # seconds per request
    retries: int = 3  # of requests that may succeed later, with exponential back-off
    extra: Mapping[str, object] = field(default_factory=dict)  # further fields of every request
    key: str = field(default="none", repr=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f'server = "{self.url}": write a URL such as http://127.0.0.1:8000/v1')
        if self.concurrency < 1:
            raise ConfigError(f"concurrency = {self.concurrency} must be at least 1")


@dataclass(slots=True)
class Row:
    """One answer while it grows. `n_tokens` counts as the server does."""

    text: str = ""
    n_tokens: int = 0
    reason: FinishReason | None = None
    error: str | None = None


class ServerEngine:
    """As `Engine`, with the policy behind a server; the tokenizer renders prompts and counts tokens of results."""

    def __init__(
        self,
        server: Server,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig,
        cuts: CutPolicy,
        reward: Reward | None,
        prompt_format: PromptFormat = "chat",
    ) -> None:
        if isinstance(cuts, MemoryCuts):
            raise ConfigError("cuts when memory is full need the keys and values here; use a schedule with a server")
        if cuts.is_cutting and reward is None:
            raise ConfigError("cuts compare rewards of partial answers; set a reward or use no cuts")
        self.server, self.tokenizer, self.sampling, self.cuts = server, tokenizer, sampling, cuts
        self.reward, self.prompt_format = reward, prompt_format

    def generate(self, prompts: Sequence[Prompt], on_progress: Progress | None = None) -> Iterator[list[Candidate]]:
        """One list of n candidates per prompt, in input order; see Engine.generate.

        A request that fails for good makes one error row. A server that cannot be reached at all, or is gone before
        the last answer, is an UnreachableError: rows that only say so would be taken for the policy's.
        """
        with asyncio.Runner() as runner:
            client = runner.run(self._connect())
            try:
                limits = _Limits(asyncio.Semaphore(self.server.concurrency), asyncio.Semaphore(self._prompts_at_once))
                jobs = [runner.run(_started(self._prompt(client, limits, prompt))) for prompt in prompts]
                for done, job in enumerate(jobs, start=1):
                    candidates = runner.run(_result(job))
                    if on_progress is not None:
                        on_progress(done, len(jobs))
                    yield candidates
            finally:
                runner.run(client.close())

    @property
    def _prompts_at_once(self) -> int:
        """Enough to keep the server busy while other prompts are scored or have few answers left."""
        return 1 + -(-2 * self.server.concurrency // self.cuts.n_survivors(self.sampling.n))

    async def _connect(self) -> "AsyncOpenAI":
        try:
            from openai import APIConnectionError, AsyncOpenAI, AuthenticationError, OpenAIError
        except ImportError as error:
            raise ConfigError("a server needs the openai client; pip install 'winnow[server]'") from error
        server = self.server
        client = AsyncOpenAI(
            base_url=server.url, api_key=server.key, timeout=server.timeout, max_retries=server.retries
        )
        try:
            await client.models.list()
        except AuthenticationError as error:
            raise ConfigError(
                f'server "{server.url}" refuses the key ({_reason(error)}); set OPENAI_API_KEY'
            ) from error
        except APIConnectionError as error:
            raise _unreachable(server.url, error) from error
        except OpenAIError:
            pass  # not every server lists its models; the first request will tell
        return client

    async def _prompt(self, client: "AsyncOpenAI", limits: "_Limits", prompt: Prompt) -> list[Candidate]:
        async with limits.prompts:
            n = self.sampling.n
            try:
                text = render_prompt(self.tokenizer, prompt.messages, self.prompt_format)
            except InputError as error:
                return [one for one in Job.failed(prompt, n, str(error)).candidates if one is not None]
            job = Job.of(prompt, [], n, self.cuts)
            while not job.is_complete:
                await self._wave(client, limits, job, text)
                job.advance()
            return [candidate for candidate in job.candidates if candidate is not None]

    async def _wave(self, client: "AsyncOpenAI", limits: "_Limits", job: Job, text: str) -> None:
        """Draw the job's wave to its end, cutting on the way."""
        if self.reward is not None and self.cuts.is_cutting:
            job.session = self.reward.start([job.prompt] * len(job.candidates))
        rows = {index: Row() for index in job.wave}
        for until in [*self.cuts.tokens, self.sampling.max_new_tokens]:
            running = [index for index in rows if job.candidates[index] is None]
            if not running or until > self.sampling.max_new_tokens:
                continue
            await asyncio.gather(
                *(self._grow(client, limits, job, (index, rows[index]), text, until) for index in running)
            )
            for index in running:
                if rows[index].reason is not None:
                    job.candidates[index] = self._candidate(job, index, rows[index])
            self._cut(job, rows, until)
        for index, row in rows.items():
            if job.candidates[index] is None:
                row.reason = "length"
                job.candidates[index] = self._candidate(job, index, row)
        if job.wave.stop < len(job.candidates):
            self._score(job, rows, [])

    async def _grow(
        self, client: "AsyncOpenAI", limits: "_Limits", job: Job, one: tuple[int, Row], text: str, until: int
    ) -> None:
        """Continue one answer up to `until` tokens."""
        from openai import APIConnectionError, APITimeoutError, OpenAIError

        (index, row), config = one, self.sampling
        if until <= row.n_tokens:  # the server counted more than was asked for
            return
        key = row_key(config.seed, job.prompt.prompt_id, index) ^ row.n_tokens
        # Not among OpenAI's own parameters: sent only where they say something.
        beyond = {name: value for name, off in _BEYOND.items() if (value := getattr(config, name)) != off}
        try:
            async with limits.requests:
                found = await client.completions.create(
                    model=self.server.model,
                    prompt=text + row.text,
                    max_tokens=until - row.n_tokens,
                    temperature=config.temperature,
                    top_p=config.top_p,
                    seed=key & 0x7FFFFFFF,
                    stop=list(config.stop) or None,
                    extra_body={**beyond, **self.server.extra} or None,
                )
        except OpenAIError as error:
            if isinstance(error, APIConnectionError) and not isinstance(error, APITimeoutError):
                raise _unreachable(self.server.url, error) from error
            row.reason, row.error = "error", f"the server refused: {_reason(error)}"
            return
        choice = found.choices[0]
        row.text += choice.text
        row.n_tokens += found.usage.completion_tokens if found.usage else until - row.n_tokens
        if choice.finish_reason != "length":
            row.reason = "stop" if any(stop in row.text for stop in config.stop) else "eos"

    def _cut(self, job: Job, rows: dict[int, Row], until: int) -> None:
        if job.cuts.next_tokens != until:
            return
        running = [index for index in rows if job.candidates[index] is None and index in job.cuts.competing]
        if not running:
            job.cuts.skip()
            return
        partial = self._score(job, rows, running)
        for index in set(running) - partial.keys():
            job.candidates[index] = self._candidate(job, index, rows[index])
        for index in job.cuts.cut(until, partial):
            rows[index].reason = "cut"
            job.candidates[index] = self._candidate(job, index, rows[index])
        assert job.session is not None
        job.session.keep(sorted(job.cuts.competing - job.cuts.final_scores.keys()))

    def _score(self, job: Job, rows: dict[int, Row], running: list[int]) -> dict[int, float]:
        """Scores of running answers; those of finished ones go to `job.cuts`, failures into the rows."""
        assert job.session is not None
        asked = sorted([*running, *(index for index in job.unscored_finished() if index in rows)])
        job.session.extend(asked, [[] for _ in asked], [rows[index].text for index in asked])
        partial: dict[int, float] = {}
        for index, score in zip(asked, job.session.scores(asked), strict=True):
            if score.value is None:
                job.fail(index, score.error or "the reward gave no score")
                rows[index].reason, rows[index].error = "error", score.error
            elif index in running:
                partial[index] = score.value
            else:
                job.cuts.final_scores[index] = score.value
        return partial

    def _candidate(self, job: Job, index: int, row: Row) -> Candidate:
        assert row.reason is not None
        places = [place for stop in self.sampling.stop if (place := row.text.find(stop)) >= 0]
        response = row.text[: min(places)] if places else row.text
        return Candidate(
            prompt_id=job.prompt.prompt_id,
            candidate_index=index,
            token_ids=tuple(self.tokenizer.encode(row.text, add_special_tokens=False)) if row.text else (),
            response=response,
            finish_reason=row.reason,
            cut_at_token=row.n_tokens if row.reason == "cut" else None,
            cuts=tuple(job.cuts.records.get(index, ())),
            status="error" if row.error else "ok",
            error=row.error,
        )


@dataclass(frozen=True, slots=True)
class _Limits:
    requests: asyncio.Semaphore
    prompts: asyncio.Semaphore


async def _started(work: Coroutine[Any, Any, Result]) -> "asyncio.Task[Result]":
    return asyncio.create_task(work)


async def _result(task: "asyncio.Task[Result]") -> Result:
    return await task


def _unreachable(url: str, error: Exception) -> UnreachableError:
    return UnreachableError(f'server "{url}" does not answer ({_reason(error)}); check URL and key')


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
