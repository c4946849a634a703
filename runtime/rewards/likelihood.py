"""The likelihood of an answer under a causal language model as reward."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from runtime.kv.arena import KVShape
from runtime.kv.attention import install, is_supported, logits_of
from runtime.models import LoadedModel, PromptFormat
from runtime.records import Prompt
from runtime.rewards.batches import Batch, BatchScorer
from runtime.rewards.incremental import Fed, IncrementalSession
from runtime.rewards.protocol import RescoringSession, RewardSession, Score


class LikelihoodReward:
    """Mean or sum of the natural log-probabilities of the answer's tokens, closing tokens included."""

    def __init__(
        self,
        loaded: LoadedModel,
        prompt_format: PromptFormat = "chat",
        batch_size: int = 32,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        self.name = "likelihood" if reduction == "mean" else "likelihood_sum"
        self.reduction = reduction
        self.loaded = loaded
        self._scorer = BatchScorer(loaded, prompt_format, batch_size, self._logps)

        self.is_incremental = is_supported(loaded.model)
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
        # A token is predicted by the one before it, so the first of an answer by the last of its prompt.
        return IncrementalSession(self.loaded, prompts, self._scorer.encode, self._read, overlap=1)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Score]:
        """See Reward."""
        return self._scorer.score(prompts, responses)

    def _read(self, fed: Sequence[Fed]) -> list[float]:
        for one in fed:
            logits = logits_of(self.loaded.model, one.hidden[:-1]).float()
            targets = torch.tensor(one.row.ids[one.n_stored + 1 :], device=logits.device)
            logps = logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(dim=-1)
            one.row.values = one.row.values[: one.n_stored] + logps.tolist()
        return [sum(one.row.values) / (len(one.row.values) if self.reduction == "mean" else 1) for one in fed]

    @torch.inference_mode()
    def _logps(self, batch: Batch) -> Tensor:
        output = self.loaded.model(input_ids=batch.token_ids, attention_mask=batch.mask, use_cache=False)
        logits = output.logits[:, :-1].float()  # position t predicts token t + 1
        targets = batch.token_ids[:, 1:]
        logps = logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(dim=-1)  # (batch, tokens - 1)
        place = torch.arange(1, batch.token_ids.shape[1], device=targets.device)[None]
        is_answer = (place >= batch.n_prompt[:, None]) & (place < batch.n_tokens[:, None])
        total = torch.where(is_answer, logps, 0.0).sum(-1)
        return total / (batch.n_tokens - batch.n_prompt) if self.reduction == "mean" else total
