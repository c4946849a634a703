"""Choice of the device, and of what is multiplied in."""

import pytest
import torch

from runtime.errors import ConfigError
from runtime.hardware import factor_dtype, pick_device


def test_auto_takes_the_gpu_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (pick_device("auto"), pick_device("cpu")) == ("cpu", "cpu")
    with pytest.raises(ConfigError, match='device = "cuda" but torch sees no GPU'):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (pick_device("auto"), pick_device("cuda:1")) == ("cuda", "cuda:1")


def test_unknown_device_is_named() -> None:
    with pytest.raises(ConfigError, match='device = "tpu" is unknown'):
        pick_device("tpu")


@pytest.mark.parametrize("is_native", [True, False])
def test_short_floats_are_multiplied_in_float32_where_the_processor_cannot(
    monkeypatch: pytest.MonkeyPatch, is_native: bool
) -> None:
    for name in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: is_native)
    for dtype in (torch.bfloat16, torch.float16):
        assert factor_dtype(dtype) == (dtype if is_native else torch.float32)
    for dtype in (torch.float32, torch.float64):
        assert factor_dtype(dtype) == dtype
