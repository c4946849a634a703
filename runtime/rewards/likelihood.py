"""The likelihood of an answer under a causal language model as reward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.models import LoadedModel, PromptFormat
from runtime.records import Prompt
from runtime.rewards.batches import Batch, BatchScorer
from runtime.rewards.protocol import RescoringSession, RewardSession, Score


class LikelihoodReward:
    """Mean natural log-probability per token of the answer, closing tokens included."""

    def __init__(self, loaded: LoadedModel, prompt_format: PromptFormat = "chat", batch_size: int = 32) -> None:
        self.name = "likelihood"
        self.loaded = loaded
        self._scorer = BatchScorer(loaded, prompt_format, batch_size, self._mean_logps)

    def start(self, prompts: Sequence[Prompt]) -> RewardSession:
        """See Reward."""
        return RescoringSession(self, prompts)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Score]:
        """See Reward."""
        return self._scorer.score(prompts, responses)

    @torch.inference_mode()
    def _mean_logps(self, batch: Batch) -> Tensor:
        output = self.loaded.model(input_ids=batch.token_ids, attention_mask=batch.mask, use_cache=False)
        logits = output.logits[:, :-1].float()  # position t predicts token t + 1
        targets = batch.token_ids[:, 1:]
        logps = logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(dim=-1)  # (batch, tokens - 1)
        place = torch.arange(1, batch.token_ids.shape[1], device=targets.device)[None]
        is_answer = (place >= batch.n_prompt[:, None]) & (place < batch.n_tokens[:, None])
        return torch.where(is_answer, logps, 0.0).sum(-1) / (batch.n_tokens - batch.n_prompt)
