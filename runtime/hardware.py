"""What the machine offers: which device to use."""

import torch

from runtime.errors import ConfigError


def pick_device(choice: str = "auto") -> str:
    """`auto` is the first GPU where there is one, else the CPU."""
    if choice == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if choice.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f'device = "{choice}" but torch sees no GPU; set device = "cpu" or "auto"')
    if choice != "cpu" and not choice.startswith("cuda"):
        raise ConfigError(f'device = "{choice}" is unknown; use "auto", "cpu" or "cuda"')
    return choice
