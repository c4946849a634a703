import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.edge.layout import RecordLayout
from runtime.edge.quantise import FLOATS, dequantise, quantise, row_bytes, unpack
from runtime.edge.records import Matrix, WeightFormat
from runtime.edge.store import Workspace
from runtime.errors import ConfigError, ModelError


@given(seed=st.integers(0, 2**31 - 1), scale=st.floats(1e-6, 1e3), group=st.sampled_from([2, 8, 32]))
def test_an_int8_weight_comes_back_within_half_a_step_of_its_group(seed: int, scale: float, group: int) -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed)) * scale
    matrix = quantise(weight, "int8", group)
    assert matrix.scales is not None
    half_step = matrix.scales.float().repeat_interleave(group, dim=1) / 2
    assert ((dequantise(matrix) - weight).abs() <= half_step * 1.0001).all()


@given(seed=st.integers(0, 2**31 - 1), group=st.sampled_from([8, 16, 32]))
def test_an_int4_weight_is_no_further_than_with_the_widest_scale(seed: int, group: int) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
    parts = weight.reshape(16, -1, group)
    scale = parts.abs().amax(-1, keepdim=True) / 7
    plain = (parts / scale).round().clamp(-8, 7) * scale
    own = dequantise(quantise(weight, "int4", group)).reshape(parts.shape)
    assert (own - parts).square().sum() <= (plain - parts).square().sum()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantising_what_was_quantised_changes_nothing(format: WeightFormat) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).half().float()
    once = dequantise(quantise(weight, format))
    again = dequantise(quantise(once, format))
    assert torch.allclose(once, again, rtol=2e-3, atol=0)


@pytest.mark.parametrize("format", ["float32", "float16", "bfloat16", "int8", "int4"])
def test_rows_can_be_taken_before_or_after(format: WeightFormat) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    matrix, rows = quantise(weight, format), torch.tensor([9, 2, 2, 15])
    scales = None if matrix.scales is None else matrix.scales[rows]
    assert torch.equal(dequantise(Matrix(matrix.values[rows], scales, format)), dequantise(matrix)[rows])
    size, scale_size = row_bytes(64, format)
    assert size == matrix.values[0].numel() * matrix.values.itemsize
    assert scale_size == (0 if matrix.scales is None else matrix.scales[0].numel() * 2)


def test_packed_bytes_hold_the_even_column_in_their_low_half() -> None:
    assert unpack(torch.tensor([[0x80 | 0x0F, 0x12]], dtype=torch.uint8)).tolist() == [[7, 0, -6, -7]]


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_zeros_and_the_smallest_numbers_do_not_become_something_else(format: WeightFormat) -> None:
    weight = torch.zeros(2, 64)
    weight[1, 3] = -3e-9
    back = dequantise(quantise(weight, format))
    assert torch.equal(back[0], weight[0])
    assert (back - weight).abs().max() <= np.finfo(np.float16).smallest_subnormal


def test_a_group_that_does_not_divide_the_columns_is_refused_with_one_that_does() -> None:
    with pytest.raises(ConfigError, match="group = 64 must be even and divide the 96 columns; use 32"):
        quantise(torch.ones(2, 96), "int8", 64)


def test_what_a_format_cannot_hold_is_refused() -> None:
    with pytest.raises(ModelError, match="not a finite number"):
        quantise(torch.tensor([[float("nan"), 1.0]]), "int8", 2)
    with pytest.raises(ModelError, match="above float16"):
        quantise(torch.full((1, 32), 1e6), "float16")
    with pytest.raises(ModelError, match="above float16"):
        quantise(torch.full((1, 32), 1e8), "int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4"])
def test_an_operand_is_bit_for_bit_the_weights_and_a_view_where_nothing_is_widened(
    format: WeightFormat, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    matrix = quantise(torch.randn(20, 64, generator=torch.Generator().manual_seed(0)), format, 16)
    workspace = Workspace(8, RecordLayout(64, format, 16), matrix.values.dtype, dtype)
    for rows in (slice(3, 11), slice(16, 20)):
        operand = workspace.operand(matrix, rows)
        assert operand.dtype == dtype
        assert torch.equal(operand, dequantise(matrix, dtype)[rows])
        is_view = operand.data_ptr() == matrix.values[rows].data_ptr()
        assert is_view == (FLOATS.get(format) == dtype)
