"""The weights that take part: the policy that is trained, the reference it started from, the anchor that follows it."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtime.alignment.adapters import reference_of, with_adapters
from runtime.alignment.config import LoraSettings
from runtime.alignment.logps import unwrapped
from runtime.models import LoadedModel

ANCHOR = "anchor"  # the adapter's name


@dataclass(frozen=True, slots=True)
class Cast:
    """Who takes part beside policy and reference."""

    has_anchor: bool = False
    has_values: bool = False


@dataclass(slots=True)
class Players:
    """model: what is trained, perhaps in an adapter's wrapper; policy: the same weights, as the engine takes them."""

    model: PreTrainedModel
    policy: LoadedModel
    reference: "Other"
    anchor: "Other | None"
    value_head: nn.Linear | None

    @classmethod
    def of(cls, loaded: LoadedModel, lora: LoraSettings | None, cast_: "Cast", seed: int) -> "Players":
        """Around `loaded.model`, which is trained in place. The value head starts as zero."""
        model = with_adapters(loaded.model, lora, "CAUSAL_LM", seed).train(False)
        policy = replace(loaded, model=unwrapped(model))
        found = reference_of(model)
        reference = Other(policy, found) if isinstance(found, nn.Module) else Other(policy, None, found)
        anchor = _anchor(model, policy) if cast_.has_anchor else None
        head = None
        if cast_.has_values:
            head = nn.Linear(int(policy.model.config.hidden_size), 1).to(policy.model.device)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        return cls(model, policy, reference, anchor, head)

    def trained(self) -> dict[str, nn.Parameter]:
        """The weights that the optimizer moves, the value head's last."""
        found = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        if self.value_head is not None:
            found |= {f"value_head.{name}": one for name, one in self.value_head.named_parameters()}
        return found

    def follow(self, rate: float) -> None:
        """anchor <- (1 - rate) anchor + rate policy."""
        assert self.anchor is not None
        with torch.no_grad():
            for behind, ahead in zip(self.anchored().values(), self._followed(), strict=True):
                behind.lerp_(ahead, rate)

    def anchored(self) -> dict[str, Tensor]:
        """The anchor's weights, without those that it shares."""
        assert self.anchor is not None
        if self.anchor.own is not None:
            return dict(self.anchor.own.named_parameters())
        return {name: one for name, one in self.model.named_parameters() if f".{ANCHOR}." in name}

    def _followed(self) -> list[Tensor]:
        assert self.anchor is not None
        if self.anchor.own is not None:
            return list(self.model.parameters())
        known = dict(self.model.named_parameters())
        return [known[name.replace(f".{ANCHOR}.", ".default.")] for name in self.anchored()]


@dataclass(frozen=True, slots=True)
class Other:
    """Weights beside the policy's: a model of its own, or the policy under another adapter or none."""

    policy: LoadedModel
    own: nn.Module | None
    switched: Any = nullcontext

    @contextmanager
    def active(self) -> Iterator[LoadedModel]:
        """The model to draw from and to ask for log-probabilities; no gradient is kept."""
        with torch.no_grad():
            if self.own is not None:
                yield replace(self.policy, model=cast(PreTrainedModel, self.own))
                return
            switch = cast(AbstractContextManager[object], self.switched())
            with switch:
                yield self.policy


def load_tensors(into: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Copy tensors of the same names and shapes."""
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(found[name])


def _anchor(model: PreTrainedModel, policy: LoadedModel) -> Other:
    if not hasattr(model, "peft_config"):
        return Other(policy, copy.deepcopy(model).requires_grad_(False))
    peft = cast(Any, model)
    peft.add_adapter(ANCHOR, peft.peft_config["default"])
    known = dict(peft.named_parameters())
    for name, one in known.items():
        if f".{ANCHOR}." in name:
            one.data.copy_(known[name.replace(f".{ANCHOR}.", ".default.")].data)
            one.requires_grad_(False)

    @contextmanager
    def active() -> Iterator[None]:
        peft.set_adapter(ANCHOR, inference_mode=True)
        try:
            yield
        finally:
            peft.set_adapter("default")

    return Other(policy, None, active)
