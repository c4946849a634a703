"""The S3D adapter that a configuration names: what identifies it, decoding with it, and what that is worth."""

import hashlib
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.model_files import S3D_FILES
from storage.lake import Lake
from tasks.errors import ConfigError
from tasks.settings import GenerateConfig
from tasks.settings_drafting import DraftingConfig
from tasks.versions import pin

if TYPE_CHECKING:
    from runtime.decoding.s3d.forecast import Forecast
    from runtime.decoding.s3d.rounds import S3DDecoding
    from runtime.models import LoadedModel
    from runtime.records import Prompt

FORECAST_ROWS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class DraftingPlan:
    """Memory that an adapter adds, and its predicted speed-up by rows on this machine."""

    adapter_bytes: int
    forecasts: "tuple[Forecast, ...]"


def adapter_identity(config: DraftingConfig, lake: Lake) -> str:
    """What an adapter adds to a fingerprint: its version in the lake, or the hash of its files."""
    if config.s3d_adapter.startswith("models/"):
        return pin(lake, config.s3d_adapter, "models/x")
    from tasks.adapt import adapter_path

    digest = hashlib.sha256()
    for name in S3D_FILES:
        try:
            digest.update((adapter_path(config.s3d_adapter, lake) / name).read_bytes())
        except OSError as error:
            raise ConfigError(
                f's3d_adapter = "{config.s3d_adapter}" has no {name}; give a folder or models/NAME that '
                "`winnow adapt` made"
            ) from error
    return f"sha256:{digest.hexdigest()}"


def open_s3d(config: DraftingConfig, policy: "LoadedModel", lake: Lake) -> "S3DDecoding | None":
    """How to decode with the policy's adapter; None without S3D."""
    if config.s3d == "off":
        return None
    from tasks.adapt import adapter_path

    return _opened(str(adapter_path(config.s3d_adapter, lake)), config.s3d, policy)


@lru_cache(maxsize=2)
def _opened(path: str, s3d: str, policy: "LoadedModel") -> "S3DDecoding":
    """Once per process: what `auto` has measured in one shard serves the next."""
    from runtime.decoding.s3d.adapter import load_adapter
    from runtime.decoding.s3d.rounds import S3DDecoding

    adapter = load_adapter(Path(path), policy)
    return S3DDecoding(adapter, None if s3d == "auto" else int(s3d), clock=time.perf_counter)


def timed_prompt() -> "Prompt":
    """Whose answers are begun where rounds are timed."""
    from runtime.records import Message, Prompt

    return Prompt("plan", (Message("user", "A prompt of ordinary length, " * 6),), "plan")


def plan_drafting(config: GenerateConfig, lake: Lake) -> DraftingPlan | None:
    """Measured with the policy here; None without S3D."""
    if config.s3d == "off":
        return None
    from runtime.decoding.s3d.forecast import forecast
    from tasks.models import load_policy_model, model_path, use_threads

    use_threads(config.threads)
    policy = load_policy_model(model_path(config.model, "policy", lake), config.dtype, config.device)
    s3d = open_s3d(config, policy, lake)
    assert s3d is not None
    rows = [n for n in FORECAST_ROWS if n < config.max_rows] + [config.max_rows]
    found = forecast(policy, s3d.adapter, timed_prompt(), rows, time.perf_counter, config.prompt_format)
    return DraftingPlan(s3d.adapter.n_bytes, tuple(found))
