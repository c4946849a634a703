"""The linear layers of attention and head: one token by the compiled loops, many in a type the processor multiplies."""

import torch
from torch import Tensor, nn

from runtime.edge.native import Kernels, as_matrix


class EdgeLinear(nn.Module):
    """Computes `linear`. `operand`: float32 memory to widen some rows of a weight in, None where that is no use."""

    def __init__(self, linear: nn.Linear, kernels: Kernels | None, operand: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias, self.kernels, self.operand = linear.weight, linear.bias, kernels, operand
        self.matrix = as_matrix(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., out) of (..., in)."""
        is_one = x.numel() == x.shape[-1]
        if is_one and self.kernels is not None:
            found = self.kernels.times(x.view(1, -1), self.matrix)
            found = found if self.bias is None else found + self.bias
            return found.to(x.dtype).view(*x.shape[:-1], -1)
        if is_one or self.operand is None or self.operand.numel() < x.shape[-1]:
            return nn.functional.linear(x, self.weight, self.bias)
        return self._widened(x.reshape(-1, x.shape[-1]), self.operand).view(*x.shape[:-1], -1)

    def _widened(self, x: Tensor, operand: Tensor) -> Tensor:
        """Some rows of the weight at a time: torch multiplies short floats one by one where it has to."""
        rows, found = x.float(), torch.empty(len(x), len(self.weight), dtype=x.dtype)
        n_each = operand.numel() // x.shape[1]
        for start in range(0, len(self.weight), n_each):
            here = slice(start, min(start + n_each, len(self.weight)))
            part = self.weight[here]
            wide = operand[: part.numel()].view(part.shape).copy_(part)
            product = rows @ wide.T
            found[:, here] = product if self.bias is None else product + self.bias[here]
        return found


def replace_linear(model: nn.Module, kernels: Kernels | None, operand: Tensor | None) -> None:
    """Every linear layer of `model` by an `EdgeLinear`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, EdgeLinear(child, kernels, operand))
