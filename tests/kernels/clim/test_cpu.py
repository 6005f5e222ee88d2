"""Late interaction on the CPU: the formula at every block size and dtype, int8, and what must not matter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast.kernels import cpu
from finelip_fast.kernels.clim import cpu as clim_cpu
from finelip_fast.kernels.clim.cpu import scores

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ALPHAS = [0.0, 0.3, 0.8, 1.0]


@pytest.fixture(
    scope="module",
    params=[
        "as shipped",
        "small",
        "small, by threads",
        "smallest",
        "without matrix instructions",
        "plain processor",
        "plain and small, by threads",
    ],
)
def blocks(request):
    """Block sizes; the small ones put edges between queries, items and tiles, and reach the layout of many queries."""
    name, _, by_threads = request.param.partition(", ")
    has = cpu.has
    changes = {
        "as shipped": {},
        "small": {
            "_BLOCK_QUERIES": 3,
            "_GROUP": 4,
            "_TILE_ELEMENTS": 100,
            "_INT8_TILE_ELEMENTS": 200,
            "_PRODUCT_ELEMENTS": 1000,
            "_BLOCK_ELEMENTS": 900,
            "LEAST_SHARED_WORK": 1,
            "_FEW_ELEMENTS": 30,
            "_LEAST_ELEMENTS": 1,
            "_ALONG_WORK": 40,
        },
        "smallest": {
            "_BLOCK_QUERIES": 1,
            "_TILE_ELEMENTS": 1,
            "_INT8_PRODUCTS": 2,
            "_INT8_TILE_ELEMENTS": 1,
            "_PRODUCT_ELEMENTS": 1,
            "_BLOCK_ELEMENTS": 1,
            "LEAST_SHARED_WORK": 1,
            "_FEW_ELEMENTS": 1,
            "_LEAST_ELEMENTS": 1,
            "_ALONG_WORK": 0,
        },
        "without matrix instructions": {"has": lambda feature: feature != "amx_tile" and has(feature)},
        "plain processor": {"has": lambda feature: False},
        "plain and small": {
            "has": lambda feature: False,
            "_ALONG_ELEMENTS": 100,
            "_LEAST_ALONG": 2,
            "_TILE_ELEMENTS": 100,
            "LEAST_SHARED_WORK": 1,
        },
    }
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for constant, value in changes[name].items():
            patch.setattr(cpu if constant == "has" else clim_cpu, constant, value)
        if by_threads:
            torch.set_num_threads(3)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(params=["as shipped", "plain processor"])
def processor(request, monkeypatch):
    if request.param != "as shipped":
        monkeypatch.setattr(cpu, "has", lambda feature: False)


def make(*shape, seed=0, dtype=torch.float32):
    """Random embeddings: unit rows ``[..., D]``."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1).to(dtype)


def largest_error(method, actual, queries, items, alpha):
    expected = method.score_matrix(queries.double().numpy(), items.double().numpy(), alpha)
    return float(np.abs(actual.double().numpy() - expected).max(initial=0.0))


sizes = st.fixed_dictionaries(
    {
        "n_queries": st.integers(0, 5),
        "n_items": st.integers(0, 7),
        "query_tokens": st.integers(0, 6),
        "item_tokens": st.integers(0, 9),
        "width": st.integers(1, 40),
        "seed": st.integers(0, 2**16),
    }
)


def make_pair(size, dtype=torch.float32):
    queries = make(size["n_queries"], size["query_tokens"], size["width"], seed=size["seed"], dtype=dtype)
    items = make(size["n_items"], size["item_tokens"], size["width"], seed=size["seed"] + 1, dtype=dtype)
    return queries, items


@given(size=sizes, alpha=st.sampled_from(ALPHAS), dtype=st.sampled_from(DTYPES))
@settings(max_examples=50, deadline=None)
def test_equals_the_method(method, blocks, size, alpha, dtype):
    queries, items = make_pair(size, dtype)
    actual = scores(queries, items, alpha=alpha)
    assert actual.shape == (len(queries), len(items))
    assert actual.dtype == torch.float32
    # bfloat16's pair of products: 2^-18 of a similarity, and one for each direction.
    assert largest_error(method, actual, queries, items, alpha) <= (1e-5 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n_queries", "n_items", "query_tokens", "item_tokens", "width"),
    [(1, 30, 40, 40, 512), (65, 3, 4, 5, 512), (64, 2, 1, 1, 768), (1, 200, 1, 1, 768), (3, 4, 7, 13, 65)],
)
def test_real_widths(method, processor, dtype, n_queries, n_items, query_tokens, item_tokens, width):
    queries = make(n_queries, query_tokens, width, dtype=dtype)
    items = make(n_items, item_tokens, width, seed=1, dtype=dtype)
    for alpha in (0.8, 1.0):
        actual = scores(queries, items, alpha=alpha)
        exact_cosine = dtype != torch.bfloat16 or alpha == 1.0
        assert largest_error(method, actual, queries, items, alpha) <= (2e-7 if exact_cosine else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_is_float64s(method, dtype):
    queries, items = make(64, 8, 256, dtype=dtype), make(60, 8, 256, seed=1, dtype=dtype)
    expected = torch.from_numpy(method.score_matrix(queries.double().numpy(), items.double().numpy(), 0.8))
    gaps = expected.sort(dim=1, descending=True).values[:, :10].diff().abs()
    clear = (gaps > 1e-6).all(dim=1)
    assert clear.sum() > 50
    order = scores(queries, items, alpha=0.8).argsort(dim=1, descending=True)[clear, :9]
    assert torch.equal(order, expected.argsort(dim=1, descending=True)[clear, :9])


@given(size=sizes)
@settings(max_examples=20, deadline=None)
def test_swapping_the_sides_transposes(blocks, size):
    queries, items = make_pair(size)
    unswapped, swapped = scores(queries, items, alpha=0.3), scores(items, queries, alpha=0.3)
    torch.testing.assert_close(unswapped, swapped.T, rtol=0, atol=1e-6)


@given(size=sizes.filter(lambda size: size["query_tokens"] and size["item_tokens"]))
@settings(max_examples=20, deadline=None)
def test_the_order_of_tokens_after_row_0_does_not_matter(blocks, size):
    queries, items = make_pair(size)
    generator = torch.Generator().manual_seed(size["seed"])
    shuffled = [
        torch.cat([t[:, :1], t[:, 1 + torch.randperm(t.shape[1] - 1, generator=generator)]], dim=1)
        for t in (queries, items)
    ]
    torch.testing.assert_close(scores(*shuffled, alpha=0.3), scores(queries, items, alpha=0.3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batches_join_to_the_whole(dtype):
    queries, items = make(70, 4, 64, dtype=dtype), make(9, 6, 64, seed=1, dtype=dtype)
    parts = [torch.cat([scores(q, i, alpha=0.8) for i in items.split(4)], dim=1) for q in queries.split(32)]
    torch.testing.assert_close(torch.cat(parts), scores(queries, items, alpha=0.8), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_expanded_and_mixed_inputs(dtype):
    queries, items = make(65, 5, 32, dtype=dtype), make(4, 6, 32, seed=1, dtype=dtype)
    expected = scores(queries, items, alpha=0.8)
    strided = queries.transpose(0, 2).contiguous().transpose(0, 2)
    wide = torch.stack([items, items], dim=-1)[..., 1]
    torch.testing.assert_close(scores(strided, wide, alpha=0.8), expected, rtol=0, atol=1e-6)
    expanded = queries[:1].expand(65, -1, -1)
    torch.testing.assert_close(scores(expanded, items, alpha=0.8), expected[:1].expand(65, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(scores(queries.float(), items, alpha=0.8), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("token", [0, 3], ids=["global", "other"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_with_its_item_and_its_query(blocks, dtype, token):
    queries, items = make(3, 4, 512, dtype=dtype), make(9, 5, 512, seed=1, dtype=dtype)
    clean = scores(queries, items, alpha=0.8)
    items[[1, 6], token, 2] = math.nan
    queries[2, token, 0] = math.nan
    actual = scores(queries, items, alpha=0.8)
    expected_nan = torch.zeros(3, 9, dtype=torch.bool)
    expected_nan[2], expected_nan[:, [1, 6]] = True, True
    assert torch.equal(actual.isnan(), expected_nan)
    torch.testing.assert_close(actual[~expected_nan], clean[~expected_nan], rtol=0, atol=1e-6)


def test_zero_rows_and_constant_rows(blocks):
    zeros, ones = torch.zeros(2, 3, 16), torch.full((3, 4, 16), 0.25)
    assert not scores(zeros, ones, alpha=0.8).any()
    torch.testing.assert_close(scores(ones, ones, alpha=0.0), torch.full((3, 3), 2.0))
    torch.testing.assert_close(scores(ones, -ones, alpha=0.0), torch.full((3, 3), -0.2))


@pytest.mark.skipif(not cpu.has_bfloat16(), reason="needs a processor with bfloat16 instructions")
@given(size=sizes, alpha=st.sampled_from(ALPHAS), dtype=st.sampled_from(DTYPES))
@settings(max_examples=100, deadline=None)
def test_rounded_products_are_off_by_no_more_than_is_said(method, blocks, size, alpha, dtype):
    queries, items = make_pair(size, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "has_bfloat16", lambda: True)
        allowed = 5e-6 + 2 * abs(1 - alpha) * clim_cpu.rounding_error(dtype)
    actual = scores(queries, items, alpha=alpha, rounded=True)
    assert largest_error(method, actual, queries, items, alpha) <= allowed


def test_rounding_is_for_processors_and_rows_that_it_makes_faster(monkeypatch):
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: True)
    assert clim_cpu.rounding_error(torch.bfloat16) < clim_cpu.rounding_error(torch.float16)
    assert clim_cpu.rounding_error(torch.float64) is None
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: False)
    assert clim_cpu.rounding_error(torch.bfloat16) is None


def test_needs_no_gradient():
    queries, items = make(2, 4, 16).requires_grad_(), make(9, 5, 16, seed=1).requires_grad_()
    assert not scores(queries, items, alpha=0.8).requires_grad


# int8 ----------------------------------------------------------------------------------------------------------------


def integers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    return values, torch.rand(shape[:-1], generator=generator) / 500


@given(size=sizes, alpha=st.sampled_from(ALPHAS))
@settings(max_examples=40, deadline=None)
def test_int8_equals_the_method_on_what_the_integers_stand_for(method, blocks, size, alpha):
    queries, query_scales = integers(size["n_queries"], size["query_tokens"], size["width"], seed=size["seed"])
    items, item_scales = integers(size["n_items"], size["item_tokens"], size["width"], seed=size["seed"] + 1)
    actual = scores(queries, items, alpha=alpha, query_scales=query_scales, item_scales=item_scales)
    stored = [
        values.double() * scale.double()[..., None] for values, scale in [(queries, query_scales), (items, item_scales)]
    ]
    assert largest_error(method, actual, *stored, alpha) <= 5e-6


def test_int8_sums_are_exact(processor):
    # The largest sum that float32 still counts in ones, and one unit less.
    values = torch.full((1, 1, 1040), 127, dtype=torch.int8)
    less = values.clone()
    less[..., -1] = 126
    ones = torch.ones(1, 1)
    for items, expected in [(values, 1040 * 127**2), (less, 1040 * 127**2 - 127)]:
        score = scores(values, items, alpha=0.0, query_scales=ones, item_scales=ones)
        assert score.item() == 2 * expected


@pytest.mark.skipif(not cpu.has_onednn(), reason="needs a PyTorch with oneDNN")
def test_a_growing_collection_meets_few_sizes_of_products(monkeypatch):
    """oneDNN keeps what it prepares for each: a server that takes uploads would grow."""
    sizes, product = set(), cpu.linear
    monkeypatch.setattr(cpu, "suits_onednn", lambda rows: True)
    monkeypatch.setattr(cpu, "linear", lambda rows, columns: sizes.add(len(rows)) or product(rows, columns))
    items, queries = torch.randn(1200, 3, 64).half(), torch.randn(2, 3, 64)
    score_matrices = [scores(queries, items[:n_items], alpha=0.5) for n_items in range(1, 1200, 7)]
    for n_items, matrix in zip(range(1, 1200, 7), score_matrices, strict=True):
        torch.testing.assert_close(matrix, score_matrices[-1][:, :n_items])
    assert len(sizes) <= 12


@given(n_items=st.integers(1, 5000), tokens=st.integers(1, 60), columns=st.integers(1, 2000), width=st.integers(1, 600))
def test_blocks_hold_each_item_once(n_items, tokens, columns, width):
    blocks = clim_cpu._blocks(n_items, tokens, columns, width)
    assert [at for block in blocks for at in range(block.start, block.stop)] == list(range(n_items))
    fewest = max(1, clim_cpu._LEAST_ELEMENTS // (tokens * width))
    assert all(block.stop - block.start <= block.size <= fewest + 1.5 * (block.stop - block.start) for block in blocks)
    filled = sum(block.size + block.start - block.stop for block in blocks)
    assert filled <= n_items / 2 + 1 or filled * tokens * columns * width <= 2 * clim_cpu.LEAST_SHARED_WORK
