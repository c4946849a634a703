"""Which weights are trained: all, or low-rank adapters, new ones or those of an earlier training."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from runtime.alignment.config import LoraSettings
from runtime.errors import ModelError
from runtime.model_files import ADAPTER_FILE
from runtime.models import load_policy

REFERENCE = "reference"  # name of the frozen copy of an adapter that is trained on
Prints = Mapping[str, tuple[float, float]]


def with_adapters(model: PreTrainedModel, lora: LoraSettings | None, task_type: str, seed: int) -> PreTrainedModel:
    """The model as it is trained; ModelError when nothing of it would be."""
    if lora is not None and lora.adapter is not None:
        model = cast(PreTrainedModel, _known_adapter(model, lora.adapter))
    elif lora is not None:
        model = cast(PreTrainedModel, _new_adapter(model, lora, task_type, seed))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(
            "no weight of the model can be trained (an adapter loaded for use only?); "
            "give the plain model, and the adapter to go on with as lora_adapter"
        )
    return model


def reference_of(model: PreTrainedModel) -> nn.Module | Callable[[], AbstractContextManager[object]]:
    """What the policy is measured against at every step: itself without its adapter, or a frozen copy."""
    if not hasattr(model, "peft_config"):
        frozen: nn.Module = copy.deepcopy(model)
        return frozen.requires_grad_(False).train(False)
    peft = cast(Any, model)
    off: Callable[[], AbstractContextManager[object]] = peft.disable_adapter
    return _frozen_adapter(peft) if REFERENCE in peft.peft_config else off


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """The plain model with its adapter's weights added."""
    return cast(PreTrainedModel, cast(Any, model).merge_and_unload(adapter_names=["default"]))


def merged_anew(source: str, adapter: Path, dtype: str) -> PreTrainedModel:
    """The model in `source` with a saved adapter's weights added: for one that was trained in 4 bit or in shards."""
    from peft import PeftModel

    return merged(cast(PreTrainedModel, PeftModel.from_pretrained(load_policy(source, dtype).model, str(adapter))))


def prints(model: nn.Module) -> Prints:
    """Two sums of each trained weight, by which it is seen whether it moved."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            values = _whole(parameter.detach()).double()
            found[name] = (float(values.sum()), float(values.square().sum()))
    return found


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be sharded; then every process must ask."""
    return cast(torch.Tensor, cast(Any, tensor).full_tensor()) if hasattr(tensor, "full_tensor") else tensor


def check_moved(before: Prints, after: Prints) -> None:
    """ModelError when training has left every weight as it was."""
    if before == after:
        raise ModelError("training has not moved a single weight; raise learning_rate or epochs")


def _new_adapter(model: PreTrainedModel, lora: LoraSettings, task_type: str, seed: int) -> object:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets) or "all-linear",
        task_type=task_type,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # half of the new weights are drawn
            return get_peft_model(model, settings)
    except ValueError as error:
        named = ", ".join(lora.targets)
        raise ModelError(f"lora_targets = {named}: {str(error).splitlines()[0]}") from error


def _known_adapter(model: PreTrainedModel, folder: Path) -> object:
    from peft import PeftModel

    if not (folder / ADAPTER_FILE).is_file():
        raise ModelError(f"{folder} has no {ADAPTER_FILE}; give the folder of an adapter, or leave lora_adapter out")
    try:
        found = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
        found.load_adapter(str(folder), REFERENCE, is_trainable=False)
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise ModelError(f"{folder} does not fit the model: {str(error).splitlines()[0]}") from error
    return found


def _frozen_adapter(peft: Any) -> Callable[[], AbstractContextManager[object]]:
    @contextmanager
    def active() -> Iterator[None]:
        with torch.no_grad():
            peft.set_adapter(REFERENCE, inference_mode=True)
            try:
                yield
            finally:
                peft.set_adapter("default")

    return active
