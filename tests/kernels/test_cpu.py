"""Products on the CPU: the same results with any library and any memory layout of the operands."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from finelip_fast.kernels import cpu


@pytest.fixture(params=["as found", "without matrix instructions", "plain processor"])
def processor(request, monkeypatch):
    has = cpu.has
    if request.param == "without matrix instructions":
        monkeypatch.setattr(cpu, "has", lambda feature: feature != "amx_tile" and has(feature))
    elif request.param == "plain processor":
        monkeypatch.setattr(cpu, "has", lambda feature: False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(7, 40, 5), (1, 1, 1), (64, 512, 33)], ids=str)
def test_products_of_operands_that_lie_any_way(processor, sizes, dtype):
    m, k, n = sizes
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((m, k), (k, n)))
    expected = a.double() @ b.double()
    for left in (a, a.T.contiguous().T, torch.stack([a, a], dim=-1)[..., 0]):
        for right in (b, b.T.contiguous().T):
            actual = cpu.product(left, right)
            assert actual.dtype == dtype
            torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.skipif(not cpu.has_onednn(), reason="needs a PyTorch with oneDNN")
def test_packed_columns_change_nothing():
    rows, columns = torch.randn(50, 64), torch.randn(9, 64)
    torch.testing.assert_close(cpu.linear(rows, cpu.packed(columns)), cpu.linear(rows, columns), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "swish"])
@pytest.mark.parametrize("sizes", [(7, 40, 5), (1, 1, 1), (0, 8, 3), (64, 512, 33)], ids=str)
def test_frozen_layers_are_linear_layers(processor, sizes, activation, bias):
    m, k, n = sizes
    generator = torch.Generator().manual_seed(0)
    rows, weight, offset = (torch.randn(shape, generator=generator) for shape in ((m, k), (n, k), (n,)))
    weight = weight / k**0.5
    offset = offset if bias else None
    expected = F.linear(rows, weight, offset)
    functions = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "swish": F.silu}
    expected = functions.get(activation, lambda x: x)(expected)
    for precision, tolerance in {"fp32": 1e-5, "bf16": 5e-2, "int8": 5e-2}.items():
        if precision == "bf16" and not cpu.has_bfloat16():
            continue
        actual = cpu.frozen_linear(weight, offset, activation, precision)(rows)
        assert actual.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not cpu.prepares_int8(), reason="needs AMX")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 1040, 5), (300, 4096, 33)], ids=str)
def test_products_of_int8_are_exact_until_they_are_rounded(sizes):
    m, k, n = sizes
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randint(-128, 128, (size, k), generator=generator, dtype=torch.int8) for size in (m, n))
    rows[0], columns[0], columns[-1] = 127, 127, -128  # the largest sums
    scales = torch.rand(n, generator=generator)
    expected = (rows.double() @ columns.double().T).float() * scales
    torch.testing.assert_close(cpu.scaled_int8(columns, scales)(rows), expected, rtol=2e-7, atol=0)


def test_a_row_in_int8_is_the_same_in_any_company():
    rows, weight = torch.randn(3, 16), torch.randn(4, 16)
    rows[1] = 0
    rows[2] *= 1e4
    layer = cpu.frozen_linear(weight, None, precision="int8")
    assert torch.equal(layer(rows), torch.cat([layer(row[None]) for row in rows]))
    assert not layer(rows)[1].any()


def test_what_pytorch_cannot_say_is_no():
    assert cpu.has("no_such_instructions") is False


def test_onednn_can_be_switched_off():
    torch._C._set_mkldnn_enabled(False)  # `torch.backends.mkldnn.flags` warns of missing GPUs
    try:
        assert not cpu.has_onednn()
        assert not cpu.has_bfloat16()
    finally:
        torch._C._set_mkldnn_enabled(True)


@given(rows=st.integers(0, 20_000))
def test_few_rows_are_added(rows):
    extra_rows = cpu.filled_rows(rows) - rows
    assert 0 <= extra_rows < max(8, rows / 8 + 1)


def test_layers_meet_few_numbers_of_rows():
    """Each distinct number of rows has a prepared product that is kept."""
    assert len({cpu.filled_rows(rows) for rows in range(1, 2049)}) == 32 + 3 * 8


@pytest.mark.parametrize("shape", [(1, 5), (3, 7), (2, 300), (0, 4), (4, 0)], ids=str)
def test_rows_that_are_added_change_nothing(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 24, generator=generator)
    weight, bias = torch.randn(10, 24, generator=generator), torch.randn(10, generator=generator)
    torch.testing.assert_close(cpu.layer(x, weight, bias), F.linear(x, weight, bias))
