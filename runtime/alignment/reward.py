"""Reward models from pairs: Bradley-Terry on a classifier's single score, on whole answers and on their beginnings."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase

from runtime.alignment.collate import Batch, collate
from runtime.alignment.config import RewardSettings
from runtime.alignment.items import Item, Recall, as_batch, as_inputs, within
from runtime.alignment.losses import Losses
from runtime.models import PromptFormat, encode_answer
from runtime.records import Message


class RewardObjective:
    """Trains a one-label classifier; see Objective."""

    def __init__(self, settings: RewardSettings, pad_id: int) -> None:
        self.settings, self.pad_id = settings, pad_id

    def prepare(self, model: nn.Module, items: Sequence[Item], batch_size: int, recall: Recall) -> list[Item]:
        """Nothing can be computed before."""
        return list(items)

    def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """See Objective."""
        return as_inputs(collate([item.pair for item in items], self.pad_id, with_rejected=True)) | {
            "group_ids": torch.tensor([item.group_id for item in items]),
            "margins": torch.tensor([item.margin for item in items]),
        }

    def losses(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Losses:
        """See Objective."""
        scores = within(model, lambda inner: _scores(inner, as_batch(inputs)))
        chosen, rejected = scores.chunk(2)
        return bradley_terry(chosen, rejected, self.settings.margin * inputs["margins"])


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Losses:
    """-log sigmoid(r_w - r_l - margin) (arXiv 2307.09288, eq. 2; without a margin 2203.02155, eq. 1), all (pairs,)."""
    apart = chosen - rejected
    metrics = {
        "rewards/chosen": chosen.detach(),
        "rewards/rejected": rejected.detach(),
        "rewards/margins": apart.detach(),
        "rewards/accuracies": (apart > 0).to(apart.dtype),
    }
    return Losses(-logsigmoid(apart - margin), metrics)


def with_prefixes(items: Sequence[Item], n_prefixes: int, closing: Sequence[int], seed: int) -> list[Item]:
    """The items, each followed by copies whose answers stop at a random token count, under the same label.

    Beginnings are closed as partial answers are when they are scored. A count is drawn from those at which the two
    answers differ; a pair that has none gets no copies. Whether the beginning deserves the score margin is not known.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[Item] = []
    for item in items:
        pair, n_end = item.pair, len(closing)
        bodies = [ids[pair.n_prompt : len(ids) - n_end] for ids in (pair.chosen, pair.rejected)]
        first = next((i for i, (a, b) in enumerate(zip(*bodies, strict=False)) if a != b), min(map(len, bodies))) + 1
        found.append(item)
        for _ in range(n_prefixes if first < max(map(len, bodies)) else 0):
            count = int(torch.randint(first, max(map(len, bodies)), (), generator=generator))
            cut = [[*pair.chosen[: pair.n_prompt], *body[:count], *closing] for body in bodies]
            found.append(replace(item, pair=replace(pair, chosen=cut[0], rejected=cut[1]), margin=0.0))
    return found


def closed(items: Sequence[Item], closing: Sequence[int]) -> list[Item]:
    """The items with answers that end as they do when they are scored; pairs end with the end token alone."""
    return [
        replace(item, pair=replace(item.pair, chosen=_closed(item.pair.chosen, closing), chosen_spans=(),
                                   rejected=_closed(item.pair.rejected, closing), rejected_spans=()))
        for item in items
    ]  # fmt: skip


def _closed(ids: list[int], closing: Sequence[int]) -> list[int]:
    there = next((n for n in range(len(closing), 0, -1) if ids[-n:] == list(closing[:n])), 0)
    return [*ids, *closing[there:]]


def closing_ids(tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat) -> list[int]:
    """The tokens that end every answer, whatever it says."""
    ends = []
    for answer in ("a", "b c"):
        ids, n_prompt = encode_answer(tokenizer, (Message("user", "a"),), answer, prompt_format)
        ends.append(ids[n_prompt:][::-1])
    shared = next((i for i, (a, b) in enumerate(zip(*ends, strict=False)) if a != b), min(map(len, ends)))
    return ends[0][:shared][::-1]


def _scores(model: nn.Module, batch: Batch) -> Tensor:
    inner = cast(Any, model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    head = getattr(inner, "score", None)
    if head is None:  # encoder classifiers pool by themselves and know the mask
        return cast(Tensor, inner(input_ids=batch.token_ids, attention_mask=batch.mask).logits[:, 0].float())
    # transformers looks for the last token that is not the pad id, which is wrong where pad is the end token.
    hidden = inner.base_model(input_ids=batch.token_ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(hidden), device=hidden.device), batch.mask.sum(dim=-1) - 1]
    # A copy: FSDP warns of views that leave a model.
    return cast(Tensor, head(last)[:, 0].float().clone())
