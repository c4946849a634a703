"""What is computed on a batch of pairs: a method's losses, with what the method asks of the reference."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from runtime.alignment.collate import Batch, EncodedPair, collate
from runtime.alignment.items import Inputs, Item, as_batch, as_inputs, within
from runtime.alignment.logps import answer_logps, answer_logps_and_kl
from runtime.alignment.losses import AnswerLogps, Losses, LossSettings, PairLogps, needs, pair_losses
from runtime.errors import InputError

# A frozen model, or a context in which the policy is the reference (its adapter off, or a frozen one on).
Reference = nn.Module | Callable[[], AbstractContextManager[object]]
OTHER = "other_"  # prefix of the fields of the batch of mismatched answers


class PolicyObjective:
    """The methods that train a language model."""

    def __init__(self, settings: LossSettings, pad_id: int, reference: Reference | None = None) -> None:
        self.settings, self.pad_id, self.reference = settings, pad_id, reference
        self.needs = needs(settings)

    def prepare(self, model: nn.Module, items: Sequence[Item], batch_size: int) -> list[Item]:
        """See Objective: log-probabilities of the reference, which the policy still is."""
        found = list(items)
        if self.needs.mismatched:
            found = [replace(item, other=other) for item, other in zip(found, _mismatched(found), strict=True)]
        if self.needs.reference == "none":
            return found
        order = sorted(range(len(found)), key=lambda index: found[index].pair.length)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            for place, item in zip(places, self._with_reference(model, [found[p] for p in places]), strict=True):
                found[place] = item
        return found

    def collate(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """See Objective."""
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
        policy = self._pairs(self._answers(model, as_batch(inputs)))
        reference = None
        if self.needs.reference != "none":
            chosen = replace(policy.chosen, logps=inputs["reference_chosen"])
            rejected = policy.rejected and replace(policy.rejected, logps=inputs["reference_rejected"])
            reference = PairLogps(chosen, rejected)
        mismatched = None
        if self.needs.mismatched:
            with torch.no_grad():
                others = within(model, lambda inner: answer_logps(inner, as_batch(inputs, OTHER)))
            mismatched = (others.logps, inputs["other_reference"])
        found = pair_losses(self.settings, policy, reference, mismatched)
        if reference is not None and "kl" not in found.metrics:
            found.metrics["kl"] = _divergence(policy, reference)
        return found

    def _answers(self, model: nn.Module, batch: Batch) -> AnswerLogps:
        if self.needs.reference == "logits":
            reference = self.reference
            assert reference is not None, f"{self.settings.method} keeps its reference"
            return within(model, lambda inner: answer_logps_and_kl(inner, reference, batch))
        whole = self.needs.whole_sequence
        return within(model, lambda inner: answer_logps(inner, batch, whole_sequence=whole))

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
        mixed = [*prompt, *other.chosen[other.n_prompt :]]
        yield EncodedPair(item.pair.group, mixed, mixed, len(prompt))
