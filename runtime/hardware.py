"""What the machine offers: which device to use, and what its processor multiplies well."""

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


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which a processor multiplies what is kept in `dtype`: itself, or float32 where it cannot.

    Without instructions for them torch multiplies 16-bit numbers one by one: with AVX2 alone a sum of 256 rows took 16
    times as long as in float32 with the rows widened first, 64 sums of them 128 times.
    """
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype if dtype not in native or native[dtype]() else torch.float32
