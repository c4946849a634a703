"""What is computed on a batch of pairs: a method's losses, with what the method asks of the reference."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from runtime.alignment.collate import EncodedPair, collate
from runtime.alignment.items import Inputs, Item, as_batch, as_inputs
from runtime.alignment.logps import Reference, answer_logps, answer_logps_and_kl
from runtime.alignment.losses import AnswerLogps, Losses, LossSettings, PairLogps, needs, pair_losses
from runtime.alignment.packing import collate_packed, packs
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

    def prepare(self, model: nn.Module, items: Sequence[Item], batch_size: int) -> list[Item]:
        """See Objective: log-probabilities of the reference, which the policy still is."""
        found = list(items)
        if self.needs.mismatched:
            found = [replace(item, other=other) for item, other in zip(found, _mismatched(found), strict=True)]
        if self.needs.reference != "logps":
            return found
        order = sorted(range(len(found)), key=lambda index: found[index].pair.length)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            for place, item in zip(places, self._with_reference(model, [found[p] for p in places]), strict=True):
                found[place] = item
        return found

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
            with torch.no_grad():
                mismatched = (answer_logps(model, as_batch(inputs, OTHER)).logps, inputs["other_reference"])
        found = pair_losses(self.settings, policy, reference, mismatched)
        if reference is not None:
            found.metrics["kl_per_token"] = _divergence(policy, reference)
        return found

    def _pairs(self, answers: AnswerLogps) -> PairLogps:
        if not self.needs.rejected:
            return PairLogps(answers, None)
        parts = [_halves(getattr(answers, field.name)) for field in fields(AnswerLogps)]
        chosen, rejected = zip(*parts, strict=True)
        return PairLogps(AnswerLogps(*chosen), AnswerLogps(*rejected))

    @torch.no_grad()
    def _with_reference(self, model: nn.Module, items: list[Item]) -> Iterator[Item]:
        device = next(model.parameters()).device
        inputs = {name: value.to(device) for name, value in self.collate(items).items()}
        answers = answer_logps(model, as_batch(inputs)).logps.float().cpu()
        chosen, rejected = answers.chunk(2) if self.needs.rejected else (answers, torch.zeros_like(answers))
        others = torch.zeros(len(items))
        if self.needs.mismatched:
            others = answer_logps(model, as_batch(inputs, OTHER)).logps.float().cpu()
        for item, *found in zip(items, chosen.tolist(), rejected.tolist(), others.tolist(), strict=True):
            yield replace(item, reference=(found[0], found[1]), other_reference=found[2])


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


def _mismatched(items: Sequence[Item]) -> Iterator[EncodedPair]:
    """Each prompt with the chosen answer of the next pair that has another prompt."""
    for place, item in enumerate(items):
        prompt = item.pair.chosen[: item.pair.n_prompt]
        later = (items[(place + step) % len(items)].pair for step in range(1, len(items)))
        other = next((pair for pair in later if pair.chosen[: pair.n_prompt] != prompt), None)
        if other is None:
            raise InputError("kto measures its zero by answers under other prompts, but all pairs have one prompt")
        mixed, moved = [*prompt, *other.chosen[other.n_prompt :]], len(prompt) - other.n_prompt
        spans = tuple((start + moved, end + moved) for start, end in other.chosen_spans)
        yield EncodedPair(item.pair.group, mixed, mixed, len(prompt), chosen_spans=spans)
