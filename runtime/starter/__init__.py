"""The embedded starter: a small real policy, its reward model and prompts, and the recipe that makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

FOLDER = Path(__file__).parent


def path(model: Literal["policy", "reward"]) -> Path:
    """Folder of the shipped policy or reward model (Hugging Face layout)."""
    return FOLDER / model


def prompts_path() -> Path:
    """The shipped prompts: JSONL with messages, group and reference; none was in the training text."""
    return FOLDER / "prompts.jsonl"


def s3d_path() -> Path:
    """Folder of the shipped policy's S3D adapter."""
    return FOLDER / "s3d"
