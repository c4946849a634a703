"""Choice of the device."""

import pytest
import torch

from runtime.errors import ConfigError
from runtime.hardware import pick_device


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
