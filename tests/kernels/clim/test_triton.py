"""Late interaction's kernel: equal to the formula however the work is cut, and compiled for GPUs that are not here.

Runs on a GPU, or on the CPU by Triton's interpreter: ``TRITON_INTERPRET=1 pytest tests/kernels -m triton``.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from finelip_fast.errors import InputError, KernelError
from finelip_fast.kernels.clim.launches import ClimSettings, Launch, default_settings, fits, spread
from finelip_fast.kernels.clim.triton import described, scores
from finelip_fast.kernels.settings import SHIPPED, names, tuned

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_memory")]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SMALL = ClimSettings(block_items=16, queries_per_program=2, block_width=32)


def make(*shape, seed=0, device="cpu"):
    """Random embeddings: unit rows ``[..., D]``."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1).to(device)


def expected_scores(method, queries, items, alpha):
    queries, items = (t.detach().double().cpu().numpy() for t in (queries, items))
    return method.score_matrix(queries, items, alpha)


def largest_error(actual, expected):
    return float(np.abs(actual.detach().double().cpu().numpy() - expected).max(initial=0.0))


@pytest.mark.parametrize(
    ("queries", "items"),
    [((1, 1, 8), (1, 1, 8)), ((1, 40, 96), (5, 7, 96)), ((3, 52, 40), (2, 3, 40)), ((5, 3, 24), (33, 2, 24))],
    ids=str,
)
@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.0])
def test_equals_the_method(method, device, queries, items, alpha):
    queries, items = make(*queries, device=device), make(*items, seed=1, device=device)
    out = scores(queries, items, alpha=alpha, settings=SMALL)
    assert out.shape == (len(queries), len(items))
    assert out.dtype == torch.float32
    assert largest_error(out, expected_scores(method, queries, items, alpha)) <= 1e-5


@given(
    n_queries=st.integers(0, 4),
    n_items=st.integers(0, 18),
    query_tokens=st.integers(0, 17),
    item_tokens=st.integers(0, 4),
    width=st.integers(1, 40),
    queries_per_program=st.integers(1, 3),
    block_width=st.sampled_from([16, 32]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=20, deadline=None)
def test_equals_the_method_at_any_size(
    method, device, n_queries, n_items, query_tokens, item_tokens, width, queries_per_program, block_width, seed
):
    queries = make(n_queries, query_tokens, width, seed=seed, device=device)
    items = make(n_items, item_tokens, width, seed=seed + 1, device=device)
    out = scores(queries, items, alpha=0.3, settings=ClimSettings(16, queries_per_program, block_width))
    assert out.shape == (n_queries, n_items)
    assert largest_error(out, expected_scores(method, queries, items, 0.3)) <= 1e-5


@pytest.mark.parametrize(
    "cut", [ClimSettings(32, 1, 16), ClimSettings(16, 3, 64), ClimSettings(64, 5, 32, num_warps=8, num_stages=2)]
)
def test_how_the_work_is_cut_changes_nothing(device, cut):
    queries, items = make(5, 9, 72, device=device), make(35, 3, 72, seed=1, device=device)
    expected = scores(queries, items, alpha=0.8, settings=SMALL)
    torch.testing.assert_close(scores(queries, items, alpha=0.8, settings=cut), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("cut", [ClimSettings(16, 2, 32), ClimSettings(32, 1, 64), ClimSettings(16, 3, 128)], ids=str)
def test_tensor_descriptors_change_nothing(device, dtype, tokens, cut):
    """Pieces of D, all of it at once, and a piece wider than D, which no descriptor reads."""
    queries, items = make(5, 9, 64, device=device), make(35, tokens, 64, seed=1, device=device)
    scales = {}
    if dtype == torch.int8:
        (queries, scales["query_scales"]), (items, scales["item_scales"]) = (
            quantise(queries, dtype),
            quantise(items, dtype),
        )
    queries, items = queries.to(dtype), items.to(dtype)
    plain = scores(queries, items, alpha=0.8, settings=cut, **scales)
    described = scores(queries, items, alpha=0.8, settings=replace(cut, descriptor=True), **scales)
    assert torch.equal(described, plain)


def test_what_tensor_descriptors_cannot_read_is_read_without_them(device):
    cut = ClimSettings(16, 2, 32, descriptor=True)
    queries, items = make(3, 5, 32, device=device).half(), make(6, 4, 32, seed=1, device=device).half()
    expected = scores(queries, items, alpha=0.8, settings=SMALL)
    shifted = torch.cat([items.flatten()[:1], items.flatten()])[1:].view_as(items)
    by_token = items.transpose(0, 1).contiguous().transpose(0, 1)
    spaced = torch.cat([items, items], dim=1)[:, :4]
    assert shifted.data_ptr() % 16
    assert described(spaced, cut) is not None
    assert described(shifted, cut) is described(by_token, cut) is None
    assert described(items[:1].expand(6, -1, -1), cut) is None
    for rows in (shifted, by_token, spaced):
        assert torch.equal(scores(queries, rows, alpha=0.8, settings=cut), expected)


def test_nan_stays_in_its_item_with_tensor_descriptors(device):
    cut = ClimSettings(16, 1, 32, descriptor=True)
    queries, items = make(2, 5, 32, device=device), make(19, 4, 32, seed=1, device=device)
    items[7, 3, 31] = math.nan
    assert scores(queries, items, alpha=0.8, settings=cut).isnan().nonzero().tolist() == [[0, 7], [1, 7]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_default_settings_run(method, device, dtype):
    queries, items = make(4, 40, 96, device=device).to(dtype), make(3, 2, 96, seed=1, device=device).to(dtype)
    out = scores(queries, items, alpha=0.8)
    assert largest_error(out, expected_scores(method, queries, items, 0.8)) <= 1e-5


def test_swapping_the_sides_transposes(device):
    queries, items = make(3, 9, 32, device=device), make(4, 5, 32, seed=1, device=device)
    unswapped, swapped = (scores(*sides, alpha=0.8, settings=SMALL) for sides in ((queries, items), (items, queries)))
    torch.testing.assert_close(unswapped, swapped.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("queries", "items"),
    [((0, 4, 16), (3, 4, 16)), ((2, 4, 16), (0, 4, 16)), ((2, 0, 16), (3, 4, 16)), ((2, 4, 16), (3, 0, 16))],
    ids=str,
)
def test_nothing_scores_zero(device, queries, items):
    out = scores(torch.ones(queries, device=device), torch.ones(items, device=device), alpha=0.8)
    assert torch.equal(out, torch.zeros(queries[0], items[0], device=device))


def test_zero_rows_count_as_similarity_zero(method, device):
    queries, items = make(2, 5, 24, device=device), make(3, 4, 24, seed=1, device=device)
    queries[0, 1:], items[1], items[2, 0] = 0, 0, 0
    out = scores(queries, items, alpha=0.8, settings=SMALL)
    assert not out[:, 1].any()
    assert largest_error(out, expected_scores(method, queries, items, 0.8)) <= 1e-5


def test_strided_and_expanded_inputs(device):
    queries, items = make(3, 5, 48, device=device), make(6, 4, 48, seed=1, device=device)
    expected = scores(queries, items, alpha=0.8, settings=SMALL)
    by_token = queries.transpose(0, 1).contiguous().transpose(0, 1)
    last_strided = torch.stack([items, items], dim=-1)[..., 1]
    assert last_strided.stride(-1) == 2
    assert torch.equal(scores(by_token, last_strided, alpha=0.8, settings=SMALL), expected)
    views = scores(queries[:1].expand(3, -1, -1), items[1::2, 1:], alpha=0.8, settings=SMALL)
    copies = scores(queries[[0, 0, 0]], items[1::2, 1:].clone(), alpha=0.8, settings=SMALL)
    assert torch.equal(views, copies)


@pytest.mark.parametrize("token", [0, 3], ids=["global", "other"])
@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_nan_gives_nan_and_stays_where_it_is(device, token, alpha):
    queries, items = make(3, 5, 24, device=device), make(6, 4, 24, seed=1, device=device)
    clean = scores(queries, items, alpha=alpha, settings=SMALL)
    queries[1, token, 7], items[2, token, 0] = math.nan, math.nan
    out = scores(queries, items, alpha=alpha, settings=SMALL)
    poisoned = torch.zeros(3, 6, dtype=torch.bool, device=device)
    poisoned[1], poisoned[:, 2] = True, True
    assert torch.equal(out.isnan(), poisoned)
    torch.testing.assert_close(out[~poisoned], clean[~poisoned], rtol=0, atol=1e-6)


def in_plain_pytorch(queries, items, alpha):
    """The formula in the inputs' dtype, as one would write it without care."""
    s = torch.einsum("qld,nmd->qnlm", queries, items)
    leaky = F.leaky_relu(s, 0.1)
    return alpha * s[..., 0, 0] + (1 - alpha) * (leaky.amax(3).mean(2) + leaky.amax(2).mean(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_at_most_twice_as_far_off_as_pytorch(method, device, dtype):
    queries, items = make(3, 7, 65, device=device).to(dtype), make(4, 5, 65, seed=1, device=device).to(dtype)
    expected = expected_scores(method, queries, items, 0.8)
    out = scores(queries, items, alpha=0.8, settings=SMALL)
    assert out.dtype == torch.float32
    plain = largest_error(in_plain_pytorch(queries.cpu(), items.cpu(), 0.8), expected)
    assert largest_error(out, expected) <= 2 * plain + 1e-6


def quantise(rows, dtype):
    """``(rows in `dtype`, scales)``: every row's largest number becomes the largest of the type."""
    largest = 127 if dtype == torch.int8 else 448
    scales = rows.abs().amax(dim=-1) / largest
    scaled = rows / scales[..., None]
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("width", [64, 40])
def test_quantised_rows_equal_their_true_values(method, device, dtype, width):
    if device == "cuda" and dtype != torch.int8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8 products")
    # Rows of different lengths, so that a scale at the wrong place shows.
    lengths = torch.linspace(0.5, 2, 9)[:, None]
    queries, query_scales = quantise(make(3, 9, width) * lengths, dtype)
    items, item_scales = quantise(make(5, 4, width, seed=1) * lengths[:4], dtype)
    queries, items, query_scales, item_scales = (t.to(device) for t in (queries, items, query_scales, item_scales))
    out = scores(
        queries, items, alpha=0.8, query_scales=query_scales, item_scales=item_scales.T.contiguous().T, settings=SMALL
    )
    true = (queries.double() * query_scales[..., None], items.double() * item_scales[..., None])
    # Hopper adds float8 products up in fewer bits than float32.
    assert largest_error(out, expected_scores(method, *true, 0.8)) <= (1e-5 if dtype == torch.int8 else 1e-3)


@pytest.mark.parametrize(
    ("queries", "items"), [((4, 16), (9, 5, 16)), ((2, 4, 16), (5, 16)), ((2, 4, 16), (9, 5, 15))], ids=str
)
def test_shapes_that_do_not_fit_are_refused(queries, items):
    shapes = f"{list(queries)} and {list(items)}".replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(InputError, match=rf"expected queries \[Q, L_q, D\] and items \[N, L_i, D\], got {shapes}"):
        scores(torch.ones(queries), torch.ones(items), alpha=0.8)


def test_mixed_dtypes_and_too_many_query_tokens_are_refused():
    with pytest.raises(InputError, match=r"of one dtype on one device, got torch.float32 on cpu and torch.float16 on"):
        scores(torch.ones(1, 2, 16), torch.ones(1, 2, 16).half(), alpha=0.8)
    with pytest.raises(InputError, match=r"expected at most 256 query tokens, got 257: use .*clim_scores"):
        scores(torch.ones(1, 257, 16), torch.ones(1, 2, 16), alpha=0.8)


@pytest.mark.parametrize(
    ("dtype", "query_scales", "item_scales", "message"),
    [
        (torch.float16, torch.ones(2, 4), torch.ones(3, 5), "expected scales for int8 or float8_e4m3fn .* only"),
        (torch.float64, None, None, "expected float32, float16, bfloat16, int8 or float8_e4m3fn embeddings, got"),
        (torch.int8, None, torch.ones(3, 5), r"expected query_scales float32 \[2, 4\] for torch.int8 .*, got None"),
        (torch.int8, torch.ones(2, 4), torch.ones(3, 4), r"expected item_scales float32 \[3, 5\] .* \[3, 4\]"),
        (torch.int8, torch.ones(2, 4).half(), torch.ones(3, 5), "got torch.float16"),
    ],
)
def test_scales_that_do_not_fit_are_refused(device, dtype, query_scales, item_scales, message):
    queries, items = (torch.ones(shape, device=device).to(dtype) for shape in ((2, 4, 16), (3, 5, 16)))
    with pytest.raises(InputError, match=message):
        scores(queries, items, alpha=0.8, query_scales=query_scales, item_scales=item_scales)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors anywhere")
def test_tensors_on_the_cpu_are_refused():
    with pytest.raises(KernelError, match=r"got cpu: use finelip_fast\.kernels\.clim_scores"):
        scores(torch.ones(1, 2, 16), torch.ones(1, 2, 16), alpha=0.8)


# Compiled for GPUs that are not here -----------------------------------------------------------------------------------


@cache
def compile_scores(capability, dtype, width, tokens, n_queries, n_items=100_000, settings=None):
    from ahead_of_time import compile_launches

    counts = n_queries, n_items
    queries, items = (torch.empty(count, tokens, width, dtype=dtype, device="meta") for count in counts)
    scales = {}
    if dtype == torch.int8:
        query_scales, item_scales = (torch.empty(count, tokens, device="meta") for count in counts)
        scales = {"query_scales": query_scales, "item_scales": item_scales}
    [compiled] = compile_launches(capability, lambda: scores(queries, items, alpha=0.8, settings=settings, **scales))
    return compiled


CASES = [
    (torch.float16, 512, 40, 1),
    (torch.bfloat16, 768, 52, 1),
    (torch.float16, 768, 52, 8),
    (torch.bfloat16, 512, 40, 8),
    (torch.int8, 512, 40, 8),
    (torch.int8, 768, 52, 8),
    (torch.int8, 1024, 52, 1),
    (torch.int8, 1280, 65, 8),
    (torch.float16, 1280, 65, 64),
    (torch.float32, 512, 40, 8),
]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_fits_and_spills_nothing(capability, case):
    from ahead_of_time import SHARED_MEMORY_LIMIT

    compiled = compile_scores(capability, *case)
    assert compiled.shared_bytes <= SHARED_MEMORY_LIMIT[capability]
    assert compiled.spilled_bytes == 0
    assert not compiled.overwritten
    assert compiled.uses_wgmma is (capability == 90 and case[0] != torch.float32)


@pytest.mark.parametrize("n_queries", [1, 8, 64])
def test_few_items_are_spread_over_many_programs(n_queries):
    usual = default_settings(capability=90, dtype=torch.float16, width=512, n_queries=n_queries, query_tokens=40)

    def programs(n_items):
        cut = spread(usual, n_queries, n_items)
        return -(-n_items // cut.block_items) * -(-n_queries // cut.queries_per_program)

    assert programs(256) >= 16  # 2 at the usual settings, for one query
    assert spread(usual, n_queries, 100_000) == usual
    assert spread(usual, n_queries, 0).block_items == 16


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_tensor_descriptors_replace_loads_and_take_fewer_registers(capability, dtype):
    cut = ClimSettings(64, 1, 64, num_warps=4, num_stages=3)
    plain, described = (
        compile_scores(capability, dtype, 512, 40, 1, settings=replace(cut, descriptor=descriptor))
        for descriptor in (False, True)
    )
    assert "cp.async.bulk.tensor" in described.ptx
    assert "cp.async.bulk.tensor" not in plain.ptx
    assert described.fits
    if capability != 120:  # there, Triton 3.6 takes a few more, and 8 bytes of stack
        assert described.spilled_bytes == 0
        assert not described.overwritten
        assert described.registers <= plain.registers


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_queries_in_one_piece_are_held_once(capability, dtype):
    """Shared memory has them once, beside as many pieces of items as there are stages."""
    cut = ClimSettings(64, 1, 512, num_warps=8, num_stages=2)
    compiled = compile_scores(capability, dtype, 512, 40, 1, settings=cut)
    rows = cut.columns(40) + cut.num_stages * cut.block_items
    assert compiled.shared_bytes < rows * 512 * dtype.itemsize + 1024


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("case", sorted(case for case in names(SHIPPED) if case.startswith("clim ")))
def test_shipped_settings_fit_and_spill_nothing(case):
    gpu, name, *sizes = case.split()[1:]
    width, tokens, n_queries = (int(size.partition("=")[2]) for size in sizes)
    dtype, capability = getattr(torch, name), int(gpu.removeprefix("sm_"))
    cut = tuned(case, ClimSettings)
    assert fits(cut, Launch(capability, dtype, width, n_queries, tokens))
    compiled = compile_scores(capability, dtype, width, tokens, n_queries, settings=cut)
    assert compiled.fits
    assert compiled.spilled_bytes == 0
    assert not compiled.overwritten


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize(
    "case", [(torch.float16, 512, 40, 1), (torch.int8, 512, 40, 8), (torch.float32, 512, 40, 1)], ids=str
)
def test_for_few_items_it_fits_too(capability, case):
    compiled = compile_scores(capability, *case, n_items=256)
    assert compiled.fits
    assert compiled.spilled_bytes == 0
    assert not compiled.overwritten


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_items_and_scores_are_addressed_in_64_bits():
    """An index of 4 GB is past 32 bits; its block is widened before it is multiplied."""
    ttir = compile_scores(90, torch.float16, 512, 40, 8).ttir
    for name in ("items", "queries", "out"):
        base = re.search(rf"(%\S+) = tt\.splat %{name} :", ttir)
        assert base is not None, name
        moves = re.findall(rf"tt\.addptr {re.escape(base[1])}, \S+ : \S+, (\S+)", ttir)
        assert moves, name
        assert all("i64" in width for width in moves), name
    assert re.search(r"arith\.muli %row\S*, \S+ : i64", ttir)
    assert re.search(r"arith\.muli %item\S*, \S+ : tensor<\d+xi64>", ttir)
