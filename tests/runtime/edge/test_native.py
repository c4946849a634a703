"""Compiled loops compute what torch computes, one token at a time."""

import sys
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from runtime import edge
from runtime.edge import attention, native
from runtime.edge.native import Kernels, as_matrix, compiled
from runtime.edge.quantise import dequantise, quantise
from runtime.edge.records import LayerPredictor, Matrix, WeightFormat

pytest.importorskip("numba", reason="needs numba: .venv/bin/pip install -e '.[native]'")

FORMATS: list[tuple[WeightFormat, int]] = [
    *((cast(WeightFormat, name), 32) for name in ("float32", "float16", "bfloat16")),
    *(("int8", group) for group in (2, 16, 32, 96)),
    *(("int4", group) for group in (2, 16, 32, 96)),
]
COLS = 96


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _matrix(format: WeightFormat, group: int, rows: int = 40, seed: int = 0) -> Matrix:
    return quantise(_random(rows, COLS, seed=seed), format, group)


def _exact(matrix: Matrix) -> Tensor:
    return dequantise(matrix).double()


@pytest.mark.parametrize(("format", "group"), FORMATS)
@pytest.mark.parametrize("n", [0, 1, 3, 4, 17])
def test_products_with_some_rows(format: WeightFormat, group: int, n: int) -> None:
    matrix, places = _matrix(format, group), torch.randperm(40, generator=torch.Generator().manual_seed(n))[:n]
    x, weights = _random(1, COLS), _random(1, n, seed=1)
    chosen = _exact(matrix)[places]
    torch.testing.assert_close(Kernels().times(x, matrix, places).double(), x.double() @ chosen.T, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        Kernels().mixed(weights, matrix, places).double(), weights.double() @ chosen, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_what_neurons_put_out(format: WeightFormat, group: int) -> None:
    gate, up, down = (_matrix(format, group, seed=seed) for seed in range(3))
    places, x = torch.tensor([5, 0, 39, 7, 8, 21]), _random(1, COLS)
    exact = [_exact(one)[places] for one in (gate, up, down)]
    act = torch.relu(x.double() @ exact[0].T)
    assert 0 < int((act > 0).sum()) < 6
    wanted = (act * (x.double() @ exact[1].T)) @ exact[2]
    for found in (
        Kernels().relu_neurons(x, gate, up, down, places),
        Kernels().finished(x, act.float(), up, down, places),
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_a_row_gives_the_same_bits_whatever_it_is_asked_for_with(format: WeightFormat, group: int) -> None:
    matrix, x = _matrix(format, group), _random(1, COLS)
    together = Kernels().times(x, matrix)
    for place in range(40):
        assert Kernels().times(x, matrix, torch.tensor([place]))[0, 0] == together[0, place]


def test_a_neuron_that_is_closed_is_not_read() -> None:
    up, down = torch.ones(2, COLS), torch.ones(2, COLS)
    up[0] = down[0] = torch.nan
    found = Kernels().finished(torch.ones(1, COLS), torch.tensor([[0.0, 2.0]]), as_matrix(up), as_matrix(down))
    assert torch.equal(found, torch.full((1, COLS), 2.0 * COLS))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    rows = torch.ones(3, COLS)
    rows[1, 7] = bad
    found = Kernels().times(torch.ones(1, COLS), as_matrix(rows))
    assert torch.isfinite(found).tolist() == [[True, False, True]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_mirrored", [True, False])
def test_what_is_predicted(dtype: torch.dtype, is_mirrored: bool) -> None:
    fc1, residual = _random(6, COLS), _random(1, COLS, seed=1).to(dtype)
    fc1 = (torch.cat([fc1, -fc1]) if is_mirrored else fc1).to(dtype)
    fc2 = _random(50, len(fc1), seed=2).to(dtype)
    predictor = LayerPredictor("low_rank", fc1, fc2.T.contiguous().T, threshold=0.5)
    scores = torch.relu(residual.double() @ fc1.double().T) @ fc2.double().T
    assert (scores - 0.5).abs().min() > 1e-3  # rounding decides nothing here
    wanted = (scores[0] >= 0.5).nonzero()[:, 0].tolist()
    assert Kernels().predicted(residual, predictor, is_mirrored).tolist() == wanted != []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_attention_of_one_token(dtype: torch.dtype, heads: int) -> None:
    query, memory = _random(1, heads, 1, 8).to(dtype), _random(2, 1, max(1, heads // 3), 40, 8).to(dtype)
    key, value = memory[:, :, :, :29]  # what is filled of a memory of 40 tokens
    found, _ = attention._attention(nn.Identity(), query, key, value, None, scaling=0.3)
    wanted = nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), scale=0.3, enable_gqa=True
    )
    assert found.dtype == dtype and found.shape == (1, 1, heads, 8)
    torch.testing.assert_close(
        found[0, 0].double(), wanted[0, :, 0], rtol=0.02, atol=1e-5 if dtype == torch.float32 else 0.01
    )


def test_bytes_are_copied_from_anywhere() -> None:
    memory, out = np.arange(200, dtype=np.uint8), np.zeros((5, 7), dtype=np.uint8)
    Kernels().copy(memory, np.array([3, 150, 0]), np.array([4, 0, 2]), out)
    assert out.tolist() == [
        list(range(150, 157)), [0] * 7, list(range(7)), [0] * 7, list(range(3, 10))
    ]  # fmt: skip


def test_a_model_in_float64_has_none() -> None:
    assert native.kernels(torch.float64) is None
    assert isinstance(native.kernels(torch.bfloat16), Kernels)


def test_without_numba_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(edge, "native_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "runtime.edge.native_kernels", None)
    assert native.kernels(torch.bfloat16) is None


def test_a_loop_is_the_same_function_without_the_compiler() -> None:
    @compiled
    def total(numbers: list[int]) -> int:
        found = 0
        for number in numbers:
            found += number
        return found

    assert total.py_func([1, 2, 3]) == 6  # type: ignore[attr-defined]
