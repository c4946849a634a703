"""Conversations as padded batches of similar length: the part that model-based rewards share."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.errors import InputError, PromptTooLong
from runtime.models import LoadedModel, PromptFormat, encode_answer
from runtime.records import Message, Prompt
from runtime.rewards.protocol import Score

MIN_SHARING_ROWS = 4  # answers to one prompt that get batches of their own, so that the prompt is computed once


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded conversations; `rows` are their places in the input."""

    rows: list[int]
    token_ids: Tensor  # (batch, tokens)
    mask: Tensor  # (batch, tokens), 1 on real tokens
    n_prompt: Tensor  # (batch,)
    n_tokens: Tensor  # (batch,)

    @property
    def n_shared(self) -> int:
        """Leading tokens that all rows have in common and that end before any row does; 0 if not worth sharing."""
        if len(self.rows) < MIN_SHARING_ROWS:
            return 0
        head = self.token_ids[:, : int(self.n_tokens.min()) - 1]
        return int((head == head[:1]).all(dim=0).long().cumprod(dim=0).sum())


@dataclass(frozen=True, slots=True)
class BatchScorer:
    """Runs `values_of` (a float per conversation of a batch) over any number of answers."""

    loaded: LoadedModel
    prompt_format: PromptFormat
    batch_size: int
    values_of: Callable[[Batch], Tensor]

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Score]:
        """One score per answer, in input order; what cannot be encoded has an error."""
        scores: list[Score | None] = [None] * len(prompts)
        encoded: dict[int, tuple[list[int], int]] = {}
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            try:
                encoded[row] = self.encode(prompt, response)
            except InputError as error:
                scores[row] = Score(None, str(error))
        for batch in self._batches(encoded, prompts):
            for row, value in zip(batch.rows, self.values_of(batch).tolist(), strict=True):
                scores[row] = Score.of(value)
        return [score for score in scores if score is not None]

    def encode(self, prompt: Prompt, response: str) -> tuple[list[int], int]:
        """Ids of the whole conversation, and how many of them are the prompt; InputError when it cannot be scored."""
        token_ids, n_prompt = encode_answer(self.loaded.tokenizer, prompt.messages, response, self.prompt_format)
        limit = getattr(self.loaded.model.config, "max_position_embeddings", None)
        if limit is not None and len(token_ids) > limit:
            raise PromptTooLong(f"{len(token_ids)} tokens exceed the reward model's context of {limit}")
        if len(token_ids) == n_prompt:
            raise InputError("the answer has no tokens to score")
        return token_ids, n_prompt

    def _batches(self, encoded: dict[int, tuple[list[int], int]], prompts: Sequence[Prompt]) -> Iterator[Batch]:
        by_length = sorted(encoded, key=lambda row: (len(encoded[row][0]), row))
        n_answers = Counter(prompts[row].messages for row in encoded)
        groups: dict[tuple[Message, ...], list[int]] = {}
        for row in by_length:
            messages = prompts[row].messages
            groups.setdefault(messages if n_answers[messages] >= MIN_SHARING_ROWS else (), []).append(row)
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                yield self._batch(group[start : start + self.batch_size], encoded)

    def _batch(self, rows: list[int], encoded: dict[int, tuple[list[int], int]]) -> Batch:
        device = self.loaded.model.device
        n_tokens = torch.tensor([len(encoded[row][0]) for row in rows], device=device)
        token_ids = torch.zeros(len(rows), int(n_tokens.max()), dtype=torch.long)
        for place, row in enumerate(rows):
            token_ids[place, : len(encoded[row][0])] = torch.tensor(encoded[row][0])
        mask = torch.arange(token_ids.shape[1], device=device)[None] < n_tokens[:, None]
        n_prompt = torch.tensor([encoded[row][1] for row in rows], device=device)
        return Batch(rows, token_ids.to(device), mask.long(), n_prompt, n_tokens)
