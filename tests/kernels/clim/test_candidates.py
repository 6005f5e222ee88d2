"""The first stage of a search: exactly NumPy's integers, whatever the pieces, the batch and the processor."""

from __future__ import annotations

import doctest
import importlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finelip_fast.errors import InputError
from finelip_fast.kernels import cosine_candidates, cpu, quantize
from finelip_fast.kernels.clim import candidates
from finelip_fast.kernels.clim import rows as _rows


@pytest.fixture(scope="module", params=["as found", "plain processor"], autouse=True)
def processor(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain processor":
            patch.setattr(cpu, "has", lambda feature: False)
        yield


@pytest.fixture(params=["as shipped", "small"])
def chunks(request, monkeypatch):
    """Sizes of what is done at a time: as shipped, and a few items."""
    if request.param == "small":
        for name, size in [("_SCORE_ELEMENTS", 12), ("_COPY_BYTES", 400), ("_TINY_BYTES", 60)]:
            monkeypatch.setattr(_rows, name, size)
        monkeypatch.setattr(candidates, "_WAITING_ELEMENTS", 20)
        monkeypatch.setattr(candidates, "_PRODUCT_ELEMENTS", 50)


def make(*shape, seed=0, device="cpu"):
    """Random embeddings: unit rows ``[..., D]``."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1).to(device)


def expected_candidates(queries, values, scales, count):
    products = quantize(queries)[0].numpy().astype(np.int64) @ values.numpy().astype(np.int64).T
    with np.errstate(invalid="ignore"):  # 0 times infinity
        cosines = products.astype(np.float32) * scales.numpy()
    order = np.argsort(-np.where(np.isnan(cosines), -np.inf, cosines), axis=1, kind="stable")[:, :count]
    return torch.from_numpy(np.sort(order, axis=1))


def test_a_gpu_takes_all_items_in_one_product_and_one_selection(monkeypatch):
    calls = []
    product, first_best = cpu.product, candidates.first_best
    monkeypatch.setattr(cpu, "has", lambda feature: False)
    monkeypatch.setattr(cpu, "product", lambda *sides: calls.append("product") or product(*sides))
    monkeypatch.setattr(candidates, "first_best", lambda *cosines: calls.append("selection") or first_best(*cosines))
    values, scales = quantize(make(20_000, 512))
    queries = make(300, 512, seed=1)
    on_cpu = cosine_candidates(queries, values, scales, 5)
    assert len(calls) > 4
    calls.clear()
    for module in (candidates, _rows):
        monkeypatch.setattr(module, "is_gpu", lambda device: True)
    alive = torch.arange(20_000)[torch.arange(20_000) % 100 != 1]
    for among in (None, alive):
        calls.clear()
        indices = cosine_candidates(queries, values, scales, 5, among=among)
        assert calls.count("selection") == 1
        assert calls.count("product") <= 2
        assert among is not None or torch.equal(indices, on_cpu)


def cut(rows, at):
    pieces = list(rows.tensor_split(at))
    pieces[::2] = [piece.numpy() for piece in pieces[::2]]
    return pieces


@st.composite
def cases(draw):
    """Queries, int8 items with many ties, their scales, and a choice of them."""
    n_queries, n_items = draw(st.integers(0, 4)), draw(st.integers(0, 60))
    width = draw(st.sampled_from([1, 2, 7, 64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    largest = draw(st.sampled_from([0, 1, 127]))
    values = torch.randint(-largest, largest + 1, (n_items, width), generator=generator, dtype=torch.int8)
    odd = draw(st.sampled_from([0.5, 0.0, math.nan, math.inf]))
    scales = torch.tensor([0.25, 0.5, 1.0, odd])[torch.randint(0, 4, (n_items,), generator=generator)]
    queries = make(n_queries, width, seed=draw(st.integers(0, 2**16)))
    chosen = draw(st.sets(st.integers(0, n_items - 1)).map(sorted)) if n_items else []
    return queries, values, scales, torch.tensor(chosen, dtype=torch.int64)


@given(case=cases(), count=st.integers(1, 70), data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_numpy_in_any_pieces_and_of_any_choice(chunks, case, count, data):
    queries, values, scales, among = case
    cuts = st.lists(st.integers(0, len(values)), max_size=6).map(sorted)
    pieces, their_scales = cut(values, data.draw(cuts)), cut(scales, data.draw(cuts))
    expected = expected_candidates(queries, values, scales, count)
    of_chosen = among[expected_candidates(queries, values[among], scales[among], count)]
    for rows, factors in [(values, scales), (pieces, their_scales)]:
        indices = cosine_candidates(queries, rows, factors, count)
        assert (indices.dtype, indices.shape) == (torch.int64, (len(queries), min(count, len(values))))
        assert torch.equal(indices, expected)
        assert torch.equal(cosine_candidates(queries, rows, factors, count, among=among), of_chosen)


def test_each_query_finds_what_it_finds_alone(chunks, device):
    queries = make(5, 64, device=device)
    items, scales = quantize(make(300, 64, seed=1, device=device).repeat(2, 1))
    together = cosine_candidates(queries, items, scales, 11)
    assert together.device == queries.device
    assert torch.equal(together.cpu(), expected_candidates(queries.cpu(), items.cpu(), scales.cpu(), 11))
    for query, indices in zip(queries.split(1), together, strict=True):
        assert torch.equal(cosine_candidates(query, items, scales, 11)[0], indices)


@pytest.mark.parametrize("width", [1024, 1040, 1041, 3000, 200_000])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_products_are_rounded_once_however_wide(chunks, device, width, precision):
    # Of one sign, so that sums pass 2^24, where float32 loses as it adds up, and 2^31.
    generator = torch.Generator().manual_seed(0)
    queries, values = (-torch.randint(100, 129, (n, width), generator=generator).to(torch.int8) for n in (3, 50))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        products = candidates._products(queries.to(device), values.to(device)).cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(products, (queries.long() @ values.long().T).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_autocast_changes_nothing(dtype):
    queries, (items, scales) = make(3, 64).to(dtype), quantize(make(3000, 64, seed=1))
    expected = expected_candidates(queries, items, scales, 500)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cosine_candidates(queries, items, scales, 500), expected)


def test_what_is_strided():
    queries, values, scales = make(3, 32), *quantize(make(50, 2, 32, seed=1))
    expected = cosine_candidates(queries, values[:, 0].clone(), scales[:, 0].clone(), 9)
    assert torch.equal(cosine_candidates(queries, values[:, 0], scales[:, 0], 9), expected)
    assert torch.equal(cosine_candidates(queries.T.clone().T, values[:, 0].T.clone().T, scales[:, 0], 9), expected)
    indices = cosine_candidates(queries[:1].expand(3, -1), values[:1, 0].expand(50, -1), scales[:1, 0].expand(50), 9)
    assert indices.tolist() == [list(range(9))] * 3
    assert torch.equal(
        candidates._products(values[:1, 0].expand(2, -1), values[:1, 1].expand(5, -1)).unique(),
        (values[0, 0].long() @ values[0, 1].long()).float()[None],
    )


def test_what_is_not_finite_is_no_error(chunks):
    queries, items = make(3, 16).repeat_interleave(2, dim=0), make(9, 16, seed=1)
    queries[2, 3], queries[4, 5] = math.nan, math.inf
    items[2, 0], items[7, 1] = math.nan, -math.inf
    values, scales = quantize(items)
    indices = cosine_candidates(queries, values, scales, 8)
    finite, first = [0, 1, 3, 4, 5, 6, 8], [0, 1, 2, 3, 4, 5, 6, 8]
    assert indices.tolist() == [first] * 6  # the finite, and of the others the first
    assert cosine_candidates(queries, values, scales, 7).tolist() == [finite] * 6
    assert cosine_candidates(queries[[2, 4]], values, scales, 3).tolist() == [[0, 1, 3]] * 2


@pytest.mark.gpu
def test_items_in_host_memory_are_searched_on_the_gpu(chunks, device):
    queries, (values, scales) = make(3, 64), quantize(make(500, 64, seed=1))
    chosen = torch.arange(0, 500, 3)
    expected = expected_candidates(queries, values, scales, 20)
    of_chosen = chosen[expected_candidates(queries, values[chosen], scales[chosen], 20)]
    for rows, factors in [(values, scales), (values.pin_memory(), scales.to(device)), (values.split(99), scales)]:
        assert torch.equal(cosine_candidates(queries.to(device), rows, factors, 20).cpu(), expected)
        indices = cosine_candidates(queries.to(device), rows, factors, 20, among=chosen)
        assert torch.equal(indices.cpu(), of_chosen)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"queries": torch.ones(16)}, r"expected queries \[Q, D\] and items \[N, D\], got \[16\] and \[9, 16\]"),
        ({"queries": torch.ones(2, 15)}, r"got \[2, 15\] and \[9, 16\]"),
        ({"items": torch.ones(9, 1, 16, dtype=torch.int8)}, r"got \[2, 16\] and \[9, 1, 16\]"),
        ({"items": torch.ones(9, 16)}, "expected items in int8, got torch.float32; see quantize"),
        ({"item_scales": torch.ones(8)}, r"expected scales \[9\] in float32, got \[8\] in torch.float32; see quantize"),
        ({"item_scales": torch.ones(9).double()}, r"got \[9\] in torch.float64"),
        ({"count": 0}, "expected count of at least 1, got 0"),
        ({"count": 2.0}, "expected count to be an integer, got 2.0"),
        ({"among": torch.tensor([9])}, "expected among as int64 .* from 0 to 8, got 9 to 9"),
        ({"queries": torch.ones(2, 0), "items": torch.ones(9, 0, dtype=torch.int8)}, "with D of at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(changed, message):
    valid_arguments = {
        "queries": torch.ones(2, 16),
        "items": torch.ones(9, 16, dtype=torch.int8),
        "item_scales": torch.ones(9),
        "count": 3,
    }
    with pytest.raises(InputError, match=message):
        cosine_candidates(**(valid_arguments | changed))


def test_docstring_example():
    results = doctest.testmod(importlib.import_module("finelip_fast.kernels.clim.candidates"))
    assert results.attempted > 0
    assert results.failed == 0
