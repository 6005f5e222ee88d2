"""Products on the CPU: the same numbers from whichever library, however the operands lie in memory."""

from __future__ import annotations

import pytest
import torch

from finelip_fast.kernels import cpu


@pytest.fixture(params=["as found", "plain processor"])
def processor(request, monkeypatch):
    if request.param == "plain processor":
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
            found = cpu.product(left, right)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.skipif(not cpu.has_onednn(), reason="needs a PyTorch with oneDNN")
def test_packed_columns_change_nothing():
    rows, columns = torch.randn(50, 64), torch.randn(9, 64)
    torch.testing.assert_close(cpu.linear(rows, cpu.packed(columns)), cpu.linear(rows, columns), rtol=0, atol=1e-5)


def test_what_pytorch_cannot_say_is_no():
    assert cpu.has("no_such_instructions") is False


def test_onednn_can_be_switched_off():
    torch._C._set_mkldnn_enabled(False)  # `torch.backends.mkldnn.flags` warns of GPUs that are not here
    try:
        assert not cpu.has_onednn()
        assert not cpu.has_bfloat16()
    finally:
        torch._C._set_mkldnn_enabled(True)
