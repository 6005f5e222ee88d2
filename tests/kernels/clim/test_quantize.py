"""Quantisation: what the integers stand for, and a bound that nothing may pass."""

from __future__ import annotations

import doctest
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast.errors import InputError
from finelip_fast.kernels.clim import quantize as _quantize
from finelip_fast.kernels.clim.cpu import scores
from finelip_fast.kernels.clim.quantize import error_bound, error_terms, quantize, quantize_items


def make(*shape, seed=0):
    """Random embeddings: unit rows ``[..., D]``."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def spikes(shape, generator):
    """One large entry, the others just under half a step of the scale it forces: all of them are lost."""
    rows = torch.full(shape, 0.499 / 127) * torch.randn(shape, generator=generator).sign()
    rows[..., 0] = 1.0
    return rows


def normal(shape, generator):
    return torch.randn(shape, generator=generator)


# Rows that lose much, lose nothing, or stress the arithmetic; ``[..., D]``.
FAMILIES = {
    "unit": lambda shape, generator: F.normalize(normal(shape, generator), dim=-1),
    "float16": lambda shape, generator: F.normalize(normal(shape, generator), dim=-1).half(),
    "bfloat16": lambda shape, generator: F.normalize(normal(shape, generator), dim=-1).bfloat16(),
    "spikes": spikes,
    "spikes of one sign": lambda shape, generator: spikes(shape, generator).abs(),
    "constant": lambda shape, generator: torch.full(shape, 0.3),
    "opposite": lambda shape, generator: torch.full(shape, -0.3),
    "zero": lambda shape, generator: torch.zeros(shape),
    "half zero": lambda shape, generator: normal(shape, generator) * (normal(shape[:-1], generator) < 0)[..., None],
    "uneven norms": lambda shape, generator: normal(shape, generator) * torch.logspace(-4, 4, shape[-2])[:, None],
    "tiny": lambda shape, generator: normal(shape, generator) * 1e-25,
}
families = st.sampled_from(sorted(FAMILIES))


@given(
    kinds=st.tuples(families, families),
    n_queries=st.integers(1, 3),
    n_items=st.integers(1, 4),
    tokens=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    width=st.integers(1, 70),
    alpha=st.sampled_from([-0.5, 0.0, 0.3, 0.8, 1.0, 1.5]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_the_bound_is_never_passed(method, kinds, n_queries, n_items, tokens, width, alpha, seed):
    generator = torch.Generator().manual_seed(seed)
    queries = FAMILIES[kinds[0]]((n_queries, tokens[0], width), generator)
    items = FAMILIES[kinds[1]]((n_items, tokens[1], width), generator)
    (query_values, query_scales), (item_values, item_scales) = quantize(queries), quantize(items)
    bound = error_bound(
        error_terms(queries, query_values, query_scales), error_terms(items, item_values, item_scales), alpha=alpha
    )
    assert bound.shape == (n_queries, n_items)
    int8 = scores(query_values, item_values, alpha=alpha, query_scales=query_scales, item_scales=item_scales)
    exact = torch.from_numpy(method.score_matrix(queries.double().numpy(), items.double().numpy(), alpha))
    assert ((int8.double() - exact).abs() <= bound.double()).all()
    assert ((int8 - scores(queries, items, alpha=alpha)).abs() <= bound).all()


def test_the_bound_is_close_where_the_loss_points_at_the_other_side():
    # The query loses a vector of one direction, and the item lies along it, on a grid that loses nothing.
    query = torch.full((1, 1, 257), 0.49 / 127)
    query[..., 0] = 1.0
    item = torch.ones(1, 1, 257)
    item[..., 0] = 0.0
    (query_values, query_scales), (item_values, item_scales) = quantize(query), quantize(item)
    error = scores(query, item, alpha=0.0) - scores(
        query_values, item_values, alpha=0.0, query_scales=query_scales, item_scales=item_scales
    )
    bound = error_bound(
        error_terms(query, query_values, query_scales), error_terms(item, item_values, item_scales), alpha=0.0
    )
    assert 0.9 * bound <= error <= bound


def test_the_bound_is_small_for_embeddings():
    queries, items = make(4, 40, 512), make(5, 40, 512, seed=1)
    terms = [error_terms(rows, *quantize(rows)) for rows in (queries, items)]
    assert error_bound(*terms, alpha=0.8).max() < 0.03
    assert error_bound(*terms, alpha=0.0).max() > error_bound(*terms, alpha=1.0).max()
    torch.testing.assert_close(error_bound(*terms, alpha=0.3), error_bound(*terms[::-1], alpha=0.3).T)


@given(kind=families, seed=st.integers(0, 2**16), width=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_integers_are_within_half_a_step(kind, seed, width):
    rows = FAMILIES[kind]((3, 4, width), torch.Generator().manual_seed(seed))
    values, scales = quantize(rows)
    assert (values.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert (values.shape, scales.shape) == (rows.shape, rows.shape[:-1])
    assert values.abs().max() <= 127
    off = (rows.double() - values.double() * scales.double()[..., None]).abs()
    assert (off <= scales.double()[..., None] * (0.5 + 1e-4)).all()


def test_any_shape_before_the_rows():
    rows = make(2, 3, 4, 16)
    values, scales = quantize(rows)
    assert error_terms(rows, values, scales).shape == (2, 3, 6)
    for actual, expected in zip(quantize(rows[1, 2]), (values[1, 2], scales[1, 2]), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_a_bound_that_is_not(poison):
    queries, items = make(2, 4, 16), make(3, 5, 16, seed=1)
    items[1, 2, 3] = poison
    query_values, query_scales = quantize(queries)
    item_values, item_scales = quantize(items)
    int8 = scores(query_values, item_values, alpha=0.3, query_scales=query_scales, item_scales=item_scales)
    bound = error_bound(
        error_terms(queries, query_values, query_scales), error_terms(items, item_values, item_scales), alpha=0.3
    )
    assert int8.isfinite().all(dim=0).tolist() == [True, False, True]
    assert bound.isfinite().all(dim=0).tolist() == [True, False, True]


@pytest.mark.parametrize("elements", [1, 200, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_items_in_blocks_are_as_items_at_once(monkeypatch, elements, dtype):
    items = make(7, 5, 16).to(dtype)
    monkeypatch.setattr(_quantize, "_BLOCK_ELEMENTS", elements)
    quantized = quantize_items(items)
    values, scales = quantize(items)
    assert torch.equal(quantized.values, values)
    assert torch.equal(quantized.scales, scales)
    assert torch.equal(quantized.terms, error_terms(items, values, scales))
    assert torch.equal(quantized.anchors, items[:, :1])
    assert quantized.anchors.dtype == dtype


@pytest.mark.parametrize(("n_items", "tokens"), [(0, 5), (3, 0)])
def test_no_items_and_no_rows(n_items, tokens):
    quantized = quantize_items(make(n_items, tokens, 16))
    assert quantized.values.shape == (n_items, tokens, 16)
    assert torch.equal(quantized.terms, torch.zeros(n_items, 6))


def test_rows_without_a_width_are_refused():
    with pytest.raises(InputError, match=r"expected rows \[..., L, D\] with D of at least 1, got \[2, 3, 0\]"):
        quantize(torch.ones(2, 3, 0))


def test_docstring_example():
    results = doctest.testmod(importlib.import_module("finelip_fast.kernels.clim.quantize"))
    assert results.attempted > 0
    assert results.failed == 0
