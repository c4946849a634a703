"""A sequence classifier with one label as reward."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from runtime.errors import ModelError
from runtime.kv.arena import KVShape
from runtime.kv.attention import install, is_supported
from runtime.models import LoadedModel, PromptFormat
from runtime.records import Prompt
from runtime.rewards.batches import Batch, BatchScorer
from runtime.rewards.incremental import Fed, IncrementalSession
from runtime.rewards.protocol import RescoringSession, RewardSession, Score


class ClassifierReward:
    """The classifier's single logit on the whole conversation, closing tokens included."""

    def __init__(self, loaded: LoadedModel, prompt_format: PromptFormat = "chat", batch_size: int = 32) -> None:
        if loaded.model.config.num_labels != 1:
            raise ModelError(f"{loaded.source!r} has {loaded.model.config.num_labels} labels; a reward model needs 1")
        self.name = "classifier"
        self.loaded = loaded
        self._scorer = BatchScorer(loaded, prompt_format, batch_size, self._logits)
        # Encoder classifiers (BERT family) see the whole text at every token: nothing of a prefix can be kept.
        self.is_incremental = is_supported(loaded.model) and hasattr(loaded.model, "score")
        if self.is_incremental:
            install(loaded.model)

    @property
    def kv_bytes_per_token(self) -> int:
        """See Reward."""
        model = self.loaded.model
        return KVShape.of(model).n_bytes(1, model.dtype) if self.is_incremental else 0

    def start(self, prompts: Sequence[Prompt]) -> RewardSession:
        """See Reward."""
        if not self.is_incremental:
            return RescoringSession(self, prompts)
        return IncrementalSession(self.loaded, prompts, self._scorer.encode, self._read, overlap=0)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Score]:
        """See Reward."""
        return self._scorer.score(prompts, responses)

    def _read(self, fed: Sequence[Fed]) -> list[float]:
        last = torch.stack([one.hidden[-1] for one in fed])
        head = cast(torch.nn.Module, self.loaded.model.score)
        return cast(list[float], head(last)[:, 0].float().tolist())

    @torch.inference_mode()
    def _logits(self, batch: Batch) -> Tensor:
        model = self.loaded.model
        head = getattr(model, "score", None)
        if head is None:  # encoder classifiers pool by themselves and know the mask
            return cast(Tensor, model(input_ids=batch.token_ids, attention_mask=batch.mask).logits[:, 0].float())
        # transformers looks for the last token that is not the pad id, which is wrong where pad is the end token.
        n_shared = batch.n_shared if self.is_incremental else 0
        hidden = self._hidden(batch, n_shared)
        rows = torch.arange(len(batch.rows), device=batch.token_ids.device)
        last = hidden[rows, batch.n_tokens - 1 - n_shared]
        return cast(Tensor, head(last)[:, 0].float())

    def _hidden(self, batch: Batch, n_shared: int) -> Tensor:
        """Last hidden states behind the first `n_shared` tokens, which are computed once for the whole batch."""
        model, cache = self.loaded.model.base_model, None
        if n_shared:
            cache = model(input_ids=batch.token_ids[:1, :n_shared], use_cache=True).past_key_values
            cache.batch_repeat_interleave(len(batch.rows))
        output = model(
            input_ids=batch.token_ids[:, n_shared:],
            attention_mask=batch.mask,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return cast(Tensor, output.last_hidden_state)
