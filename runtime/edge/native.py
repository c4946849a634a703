"""One token's products by compiled loops, where the extra `native` is installed; torch does them where it is not."""

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

if TYPE_CHECKING:
    from types import ModuleType

NAME = "winnow_edge"  # of the attention that uses them
_VIEWS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.float32}
Numbers = NDArray[np.generic]


class Kernels:
    """What one token (1, n) makes of rows that are kept in 16 or 32 bits: float32 inside, rounded as torch would not.

    `places` (k,) are the rows to take of (n, H); None takes all.
    """

    def __init__(self, compiled: "ModuleType") -> None:
        self.compiled = compiled
        self.numbers = np.arange(1)

    def times(self, x: Tensor, rows: Tensor, places: Tensor | None = None) -> Tensor:
        """(1, k) float32: x (1, H) times the rows."""
        chosen = self._chosen(rows, places)
        out = np.empty(len(chosen), np.float32)
        self.compiled.dots(_vector(x), _numbers(rows), chosen, out)
        return torch.from_numpy(out)[None]

    def mixed(self, weights: Tensor, rows: Tensor, places: Tensor | None = None) -> Tensor:
        """(1, H) float32: the rows, weighted (1, k) and added up."""
        out = np.zeros(rows.shape[1], np.float32)
        self.compiled.add(_vector(weights), _numbers(rows), self._chosen(rows, places), out)
        return torch.from_numpy(out)[None]

    def finished(self, x: Tensor, act: Tensor, up: Tensor, down: Tensor, places: Tensor | None = None) -> Tensor:
        """(1, H) float32: what neurons of activation `act` (1, k) put out; nothing is read of those where it is 0."""
        out = np.zeros(down.shape[1], np.float32)
        chosen = self._chosen(up, places)
        self.compiled.finish(_vector(x), _vector(act), _numbers(up), _numbers(down), chosen, out)
        return torch.from_numpy(out)[None]

    def relu_neurons(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, places: Tensor | None = None) -> Tensor:
        """(1, H) float32: the same, their activation computed first."""
        out = np.zeros(down.shape[1], np.float32)
        chosen = self._chosen(gate, places)
        self.compiled.relu_neurons(_vector(x), _numbers(gate), _numbers(up), _numbers(down), chosen, out)
        return torch.from_numpy(out)[None]

    def _chosen(self, rows: Tensor, places: Tensor | None) -> NDArray[np.int64]:
        if places is not None:
            return cast(NDArray[np.int64], places.numpy())
        if rows.shape[0] > self.numbers.size:
            self.numbers = np.arange(rows.shape[0])
        return self.numbers[: rows.shape[0]]


class RowLinear(nn.Module):
    """`linear`, with one row at a time through the kernels."""

    def __init__(self, linear: nn.Linear, kernels: Kernels) -> None:
        super().__init__()
        self.weight, self.bias, self.kernels = linear.weight, linear.bias, kernels

    def forward(self, x: Tensor) -> Tensor:
        """(..., out) of (..., in)."""
        if x.numel() > x.shape[-1]:
            return nn.functional.linear(x, self.weight, self.bias)
        found = self.kernels.times(x.view(1, -1), self.weight)
        found = found if self.bias is None else found + self.bias
        return found.to(x.dtype).view(*x.shape[:-1], -1)


def kernels(stored: torch.dtype, dtype: torch.dtype) -> Kernels | None:
    """Those for rows that are kept as `stored` and a model that computes in `dtype`, if there are any."""
    if stored not in _VIEWS or dtype not in _VIEWS:
        return None
    try:
        from runtime.edge import native_kernels
    except (ImportError, RuntimeError):  # RuntimeError: nowhere to keep what is compiled
        return None
    return Kernels(native_kernels)


def use_kernels(model: PreTrainedModel, kernels: Kernels) -> None:
    """Let every linear layer of `model`, and the attention of one token, go through the kernels."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, RowLinear(child, kernels))
    AttentionInterface.register(NAME, _attention)
    model.config._attn_implementation = NAME


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    """query (1, heads, new, d), key and value (1, shared heads, all, d) -> (1, new, heads, d), as transformers asks."""
    if query.shape[2] > 1:
        return cast(tuple[Tensor, None], sdpa_attention_forward(module, query, key, value, attention_mask, **rest))
    from runtime.edge import native_kernels

    queries = (query[0, :, 0].float() * rest["scaling"]).numpy()
    keys, values = _numbers(key), _numbers(value)
    out = np.empty_like(queries)
    n_each = len(queries) // keys.shape[1]
    for head in range(keys.shape[1]):
        heads = slice(head * n_each, (head + 1) * n_each)
        native_kernels.attend(queries[heads], keys[0, head], values[0, head], out[heads])
    return torch.from_numpy(out).to(query.dtype)[None, None], None


def _vector(x: Tensor) -> Numbers:
    return cast(Numbers, x[0].float().numpy())


def _numbers(rows: Tensor) -> Numbers:
    return cast(Numbers, rows.view(_VIEWS[rows.dtype]).numpy())
