"""The linear layers of a bundle: one row, many, with and without the compiled loops, widened or not."""

import pytest
import torch
from torch import nn

from runtime.edge.linear import EdgeLinear, replace_linear
from runtime.edge.native import kernels

IN, OUT = 24, 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("rows_at_once", [0, 1, 7, 50, 200, None])
@pytest.mark.parametrize("is_compiled", [True, False])
def test_it_gives_what_the_layer_gives(
    dtype: torch.dtype, has_bias: bool, rows_at_once: int | None, is_compiled: bool
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=has_bias).to(dtype)
    operand = None if rows_at_once is None else torch.empty(rows_at_once * IN + 3)
    found = EdgeLinear(linear, kernels(dtype) if is_compiled else None, operand)
    x = torch.randn(1, 5, IN).to(dtype)
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if has_bias else None)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    with torch.no_grad():
        for part in (slice(None), slice(2, 3)):
            result = found(x[:, part])
            assert result.dtype == dtype
            torch.testing.assert_close(result.double(), exact[:, part], rtol=tolerance, atol=tolerance)


def test_every_layer_is_replaced() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    x = torch.randn(3, 4)
    before = model(x)
    replace_linear(model, None, None)
    assert [type(one) for one in model.modules() if hasattr(one, "weight")] == [EdgeLinear, EdgeLinear]
    assert torch.equal(model(x), before)
