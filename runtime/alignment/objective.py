"""What is computed on a batch of pairs: a method's losses, with what the method asks of the reference."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from runtime.alignment.collate import EncodedPair, collate
from runtime.alignment.items import FILLER, Inputs, Item, Recall, as_batch, as_inputs
from runtime.alignment.logps import Reference, answer_logps, answer_logps_and_kl
from runtime.alignment.losses import AnswerLogps, Losses, LossSettings, PairLogps, needs, pair_losses
from runtime.alignment.packing import collate_packed, packs
from runtime.alignment.reference import Logps, reference_logps
from runtime.errors import InputError

OTHER = "other_"  # prefix of the fields of the batch of mismatched answers


class PolicyObjective:
    """The methods that train a language model."""

    def __init__(
        self, settings: LossSettings, pad_id: int, reference: Reference | None = None, packed_tokens: int = 0
    ) -> None:
        """packed_tokens: how many a row may hold of several samples (supervised training alone); 0: one each."""
        self.settings, self.pad_id, self.reference, self.packed_tokens = settings, pad_id, reference, packed_tokens
        self.needs = needs(settings)
        self.over_processes: Callable[[Tensor], Tensor] = lambda values: values  # sums; set by the trainer

    def prepare(self, model: nn.Module, items: Sequence[Item], batch_size: int, recall: Recall) -> list[Item]:
        """See Objective: log-probabilities of the reference, which the policy still is."""
        if self.needs.reference != "logps" or not items:
            return list(items)

        def compute(pairs: Sequence[EncodedPair]) -> list[Logps]:
            return reference_logps(model, pairs, self.pad_id, batch_size)

        found = recall([item.pair for item in items], compute)
        known = [replace(item, reference=logps) for item, logps in zip(items, found, strict=True)]
        if not self.needs.mismatched:
            return known
        others = [item.other for item in known if item.other is not None]
        assert len(others) == len(known), "with_others comes first"
        of_others = recall(others, compute, "_other")
        return [replace(item, other_reference=logps[0]) for item, logps in zip(known, of_others, strict=True)]

    def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """See Objective."""
        if self.packed_tokens:
            rows = packs([len(item.pair.chosen) for item in items], self.packed_tokens)
            batch = collate_packed([[items[place].pair for place in row] for row in rows], self.pad_id)
            items = [items[place] for row in rows for place in row]
        else:
            batch = collate([item.pair for item in items], self.pad_id, self.needs.rejected)
        inputs = as_inputs(batch) | {
            "group_ids": torch.tensor([item.group_id for item in items]),
            "reference_chosen": torch.tensor([item.reference[0] for item in items]),
            "reference_rejected": torch.tensor([item.reference[1] for item in items]),
        }
        others = [item.other for item in items if item.other is not None]
        if others:
            inputs |= as_inputs(collate(others, self.pad_id, with_rejected=False), OTHER)
            inputs["other_reference"] = torch.tensor([item.other_reference for item in items])
        return inputs

    def losses(self, model: nn.Module, inputs: Inputs) -> Losses:
        """See Objective."""
        batch, reference, mismatched = as_batch(inputs), None, None
        if self.needs.reference == "logits":
            assert self.reference is not None, f"{self.settings.method} keeps its reference"
            policy, reference = map(self._pairs, answer_logps_and_kl(model, self.reference, batch))
        else:
            policy = self._pairs(answer_logps(model, batch, whole_sequence=self.needs.whole_sequence))
        if self.needs.reference == "logps":
            chosen = replace(policy.chosen, logps=inputs["reference_chosen"])
            rejected = policy.rejected and replace(policy.rejected, logps=inputs["reference_rejected"])
            reference = PairLogps(chosen, rejected)
        if self.needs.mismatched:
            mismatched = self._moved(model, inputs)
        found = pair_losses(self.settings, policy, reference, mismatched)
        if reference is not None:
            found.metrics["kl_per_token"] = _divergence(policy, reference)
        return found

    @torch.no_grad()
    def _moved(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """How far answers under other prompts have moved, on the mean of the whole batch; both (1,)."""
        moved = answer_logps(model, as_batch(inputs, OTHER)).logps - inputs["other_reference"]
        sums = torch.stack([moved.sum(), torch.ones_like(moved).sum()])
        total, count = self.over_processes(torch.zeros_like(sums) if FILLER in inputs else sums)
        return (total / count)[None], torch.zeros_like(total)[None]

    def _pairs(self, answers: AnswerLogps) -> PairLogps:
        if not self.needs.rejected:
            return PairLogps(answers, None)
        parts = [_halves(getattr(answers, field.name)) for field in fields(AnswerLogps)]
        chosen, rejected = zip(*parts, strict=True)
        return PairLogps(AnswerLogps(*chosen), AnswerLogps(*rejected))


def _halves(values: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if values is None:
        return None, None
    chosen, rejected = values.chunk(2)
    return chosen, rejected


def _divergence(policy: PairLogps, reference: PairLogps) -> Tensor:
    """Estimate of KL(reference || policy) per token, (pairs,), without bias where the reference drew the answers."""
    sides = [(policy.chosen, reference.chosen)]
    if policy.rejected is not None and reference.rejected is not None:
        sides.append((policy.rejected, reference.rejected))
    fallen = sum(((ref.logps - own.logps).detach() for own, ref in sides), start=torch.zeros(()))
    n_tokens = sum((own.n_tokens for own, _ in sides), start=torch.zeros(()))
    return fallen / n_tokens


def with_others(items: Sequence[Item], pool: Sequence[Item], max_length: int) -> list[Item]:
    """Each item with its prompt before the chosen answer of the next item of `pool` that has another prompt.

    The pool begins with the items. An answer that would go beyond max_length is cut.
    """
    found: list[Item] = []
    for place, item in enumerate(items):
        prompt = item.pair.chosen[: item.pair.n_prompt]
        later = (pool[(place + step) % len(pool)].pair for step in range(1, len(pool)))
        other = next((pair for pair in later if pair.chosen[: pair.n_prompt] != prompt), None)
        if other is None:
            raise InputError("kto measures its zero by answers under other prompts, but all pairs have one prompt")
        found.append(replace(item, other=_mixed(item.pair, other, max_length)))
    return found


def _mixed(pair: EncodedPair, other: EncodedPair, max_length: int) -> EncodedPair:
    mixed = [*pair.chosen[: pair.n_prompt], *other.chosen[other.n_prompt :]][:max_length]
    moved = pair.n_prompt - other.n_prompt
    spans = tuple((start + moved, min(end + moved, len(mixed))) for start, end in other.chosen_spans)
    kept = tuple((start, end) for start, end in spans if start < end)
    return replace(pair, chosen=mixed, rejected=mixed, chosen_spans=kept, rejected_spans=kept, cut="")
