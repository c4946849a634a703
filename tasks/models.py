"""Which model a configuration names, what identifies it, and loading it once per process."""

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from runtime.model_files import adapter_hash, content_hash
from storage.lake import Lake
from tasks import garbage
from tasks.errors import ConfigError
from tasks.settings import STARTER, RewardConfig
from tasks.versions import pin

if TYPE_CHECKING:
    from runtime.models import LoadedModel
    from runtime.records import Prompt
    from runtime.rewards.protocol import Reward

Role = Literal["policy", "reward"]
ALLOWED_FUNCTIONS = "WINNOW_FUNCTIONS"
SHIPPED_FUNCTIONS = "runtime.starter.rule:*"


def model_path(source: str, role: Role, lake: Lake) -> str:
    """Folder or hub name behind starter, models/NAME[@version], a folder or a hub name."""
    if source == STARTER:
        from runtime.starter import path

        return str(path(role))
    if source.startswith("models/"):
        return str(lake.folder(lake.resolve(pin(lake, source, "models/x")), "model"))
    return source


def model_identity(source: str, role: Role, lake: Lake) -> str:
    """What a model adds to a fingerprint: its version in the lake, or the hash of its files."""
    if source.startswith("models/"):
        return pin(lake, source, "models/x")
    return f"sha256:{content_hash(model_path(source, role, lake))}"


def adapter_identity(source: str, lake: Lake) -> str:
    """Likewise of an adapter to go on with."""
    if source.startswith("models/"):
        return pin(lake, source, "models/x")
    return f"sha256:{adapter_hash(Path(source))}"


def reward_identity(config: RewardConfig, lake: Lake) -> str:
    """What the configured reward adds to a fingerprint: the model's identity, or the hash of the function's module."""
    if config.reward_terms:
        parts = [config.model_copy(update={"reward_terms": []}), *(term for _, term in config.terms())]
        return "+".join(reward_identity(part, lake) for part in parts)
    if config.reward == "function":
        module = inspect.getmodule(load_function(config.reward_function))
        source = inspect.getsource(module) if module else config.reward_function
        return f"sha256:{hashlib.sha256(source.encode()).hexdigest()}"
    return model_identity(config.reward_model, _reward_role(config), lake)


def load_function(name: str) -> Callable[["Prompt", str], float]:
    """The function behind package.module:name; ConfigError when there is none or it is not allowed.

    A configuration may come from whoever can start a run, so the names it may import are set where runs happen.
    """
    allowed = [SHIPPED_FUNCTIONS, *filter(None, os.environ.get(ALLOWED_FUNCTIONS, "").split(","))]
    if not any(fnmatchcase(name, pattern.strip()) for pattern in allowed):
        raise ConfigError(
            f'function "{name}" is not allowed; set {ALLOWED_FUNCTIONS}="{name}" (names or patterns, by comma) '
            "where the flows run"
        )
    module_name, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f'function "{name}" cannot be imported: {error}; write package.module:name') from error
    if not callable(function):
        raise ConfigError(f'"{name}" is not a function')
    return cast("Callable[[Prompt, str], float]", function)


def load_policy_model(path: str, dtype: str, device: str) -> "LoadedModel":
    """A causal model, loaded once per process. Callers must not train it."""
    return _cached_policy(path, dtype, _device(device))


def open_reward(config: RewardConfig, lake: Lake, batch_size: int = 32) -> "Reward":
    """The configured reward, its models loaded once per process."""
    if config.reward_terms:
        from runtime.rewards.combined import CombinedReward

        first = (1.0, config.model_copy(update={"reward_terms": []}))
        return CombinedReward(
            [(weight, open_reward(part, lake, batch_size)) for weight, part in [first, *config.terms()]]
        )
    if config.reward == "function":
        from runtime.rewards.verifier import FunctionReward

        return FunctionReward(load_function(config.reward_function), config.reward_function.partition(":")[2])
    path = model_path(config.reward_model, _reward_role(config), lake)
    if config.reward in ("likelihood", "likelihood_sum"):
        from runtime.rewards.likelihood import LikelihoodReward

        policy = _cached_policy(path, config.dtype, _device(config.device))
        reduction: Literal["mean", "sum"] = "mean" if config.reward == "likelihood" else "sum"
        return LikelihoodReward(policy, config.prompt_format, batch_size, reduction)
    from runtime.rewards.classifier import ClassifierReward

    classifier = _cached_classifier(path, config.dtype, _device(config.device))
    return ClassifierReward(classifier, config.prompt_format, batch_size)


def import_torch() -> None:
    """With what loads models, faster than whoever needs it would by itself."""
    if "torch" not in sys.modules:
        with garbage.large_imports():
            import runtime.models  # noqa: F401


def use_threads(threads: int) -> None:
    """Let torch use so many threads; more than the cores slow it down severalfold."""
    import_torch()
    import torch

    torch.set_num_threads(threads)


def _reward_role(config: RewardConfig) -> Role:
    return "reward" if config.reward == "classifier" else "policy"


def _device(choice: str) -> str:
    from runtime.hardware import pick_device

    return pick_device(choice)


@lru_cache(maxsize=4)
def _cached_policy(path: str, dtype: str, device: str) -> "LoadedModel":
    from runtime.models import load_policy

    return load_policy(path, dtype, device)


@lru_cache(maxsize=2)
def _cached_classifier(path: str, dtype: str, device: str) -> "LoadedModel":
    from runtime.models import load_classifier

    return load_classifier(path, dtype, device)
