"""The S3D adapter that a configuration names: what identifies it, and decoding with it."""

import hashlib
import time
from typing import TYPE_CHECKING

from storage.lake import Lake
from tasks.errors import ConfigError
from tasks.settings import GenerateConfig
from tasks.versions import pin

if TYPE_CHECKING:
    from runtime.decoding.s3d.rounds import S3DDecoding
    from runtime.models import LoadedModel


def adapter_identity(config: GenerateConfig, lake: Lake) -> str:
    """What an adapter adds to a fingerprint: its version in the lake, or the hash of its files."""
    if config.s3d_adapter.startswith("models/"):
        return pin(lake, config.s3d_adapter, "models/x")
    from runtime.decoding.s3d.files import CONFIG_NAME, WEIGHTS_NAME
    from tasks.adapt import adapter_path

    digest = hashlib.sha256()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        try:
            digest.update((adapter_path(config.s3d_adapter, lake) / name).read_bytes())
        except OSError as error:
            raise ConfigError(
                f's3d_adapter = "{config.s3d_adapter}" has no {name}; give a folder or models/NAME that '
                "`winnow adapt` made"
            ) from error
    return f"sha256:{digest.hexdigest()}"


def open_s3d(config: GenerateConfig, policy: "LoadedModel", lake: Lake) -> "S3DDecoding | None":
    """How to decode with the policy's adapter; None without S3D."""
    if config.s3d == "off":
        return None
    from runtime.decoding.s3d.adapter import load_adapter
    from runtime.decoding.s3d.rounds import S3DDecoding
    from tasks.adapt import adapter_path

    adapter = load_adapter(adapter_path(config.s3d_adapter, lake), policy)
    return S3DDecoding(adapter, None if config.s3d == "auto" else int(config.s3d), clock=time.perf_counter)
