"""Late interaction's gradient kernels: who wins each maximum, and where the gradient goes.

Runs on a GPU, or on the CPU by Triton's interpreter: ``TRITON_INTERPRET=1 pytest tests/kernels -m triton``.
"""

from __future__ import annotations

import math
import os
import re
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from finelip_fast.errors import InputError, KernelError
from finelip_fast.kernels.clim.gradient_triton import ClimGradientSettings, gradient, scores_with_winners
from finelip_fast.kernels.clim.launches import ClimSettings

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_memory")]

SMALL = ClimSettings(block_items=16, queries_per_program=2, block_width=32)
SMALL_BACK = ClimGradientSettings(block_sets=2, block_width=32)


def make(*shape, seed=0, device="cpu"):
    """Random embeddings: unit rows ``[..., D]``."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1).to(device)


def make_exact(*shape, seed=0, device="cpu"):
    """Rows of zeros and a few halves: all products are exact, with many ties, zeros and negative maxima among them."""
    generator = torch.Generator().manual_seed(seed)
    halves = torch.randint(-1, 2, shape, generator=generator) * 0.5
    return (halves * (torch.rand(shape, generator=generator) < 0.3)).to(device)


def in_float64(queries, items, alpha):
    """``(scores, index of each row's winner, whether each is positive, the same two the other way)``."""
    s = torch.einsum("qsd,ntd->qnst", queries.double().cpu(), items.double().cpu())
    by_row, by_column = s.max(dim=3), s.max(dim=2)  # the first of equals, as documented
    fine = F.leaky_relu(by_row.values, 0.1).mean(2) + F.leaky_relu(by_column.values, 0.1).mean(2)
    return alpha * s[..., 0, 0] + (1 - alpha) * fine, by_row, by_column


def backward(grad_scores, queries, items, *, alpha=0.8, cut=SMALL, cut_back=SMALL_BACK):
    _, *winners = scores_with_winners(queries, items, alpha=alpha, settings=cut)
    return gradient(grad_scores, queries, items, *winners, alpha=alpha, settings=cut_back)


def exact_gradient(grad_scores, queries, items, alpha=0.8):
    leaves = [t.double().cpu().requires_grad_() for t in (queries, items)]
    return torch.autograd.grad((in_float64(*leaves, alpha)[0] * grad_scores.double().cpu()).sum(), leaves)


def assert_close(actual, expected, tolerance=1e-5):
    for grad, expected_grad in zip(actual, expected, strict=True):
        assert grad.shape == expected_grad.shape
        error = (grad.double().cpu() - expected_grad).abs().max().item() if grad.numel() else 0.0
        assert error <= tolerance * max(1.0, expected_grad.abs().max().item() if expected_grad.numel() else 0.0)


def draw_grad(n_queries, n_items, device, seed=2):
    return torch.randn(n_queries, n_items, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("maker", [make, make_exact])
@pytest.mark.parametrize(("query_tokens", "item_tokens"), [(1, 1), (9, 4), (3, 17)])
def test_winners_are_torchs(device, maker, query_tokens, item_tokens):
    queries, items = maker(5, query_tokens, 24, device=device), maker(18, item_tokens, 24, seed=1, device=device)
    out, *winners = scores_with_winners(queries, items, alpha=0.8, settings=SMALL)
    expected, *maxima = in_float64(queries, items, 0.8)
    torch.testing.assert_close(out.double().cpu(), expected, rtol=0, atol=1e-5)
    for codes, maximum in zip(winners, maxima, strict=True):
        assert codes.dtype == torch.uint8
        codes = codes.cpu().int()
        assert torch.equal(codes & 127, maximum.indices.int())
        assert torch.equal(codes >= 128, maximum.values <= 0)


@pytest.mark.parametrize("tokens", [(128, 2), (2, 128)], ids=str)
def test_an_index_has_seven_bits(device, tokens):
    queries, items = make(1, tokens[0], 16, device=device), make(2, tokens[1], 16, seed=1, device=device)
    # The last token is a copy of what it meets, so that 127 wins.
    queries[0, -1] = items[0, -1] = make(1, 16, seed=3, device=device)[0]
    _, *winners = scores_with_winners(queries, items, alpha=0.8, settings=SMALL)
    assert 127 in (winners[0][0, 0, -1].item(), winners[1][0, 0, -1].item())
    grad = draw_grad(1, 2, device)
    assert_close(backward(grad, queries, items), exact_gradient(grad, queries, items))


@given(
    n_queries=st.integers(0, 3),
    n_items=st.integers(0, 4),
    query_tokens=st.integers(0, 9),
    item_tokens=st.integers(0, 5),
    width=st.integers(1, 40),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    exact=st.booleans(),
    block_sets=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=20, deadline=None)
def test_gradient_equals_float64s(
    device, n_queries, n_items, query_tokens, item_tokens, width, alpha, exact, block_sets, seed
):
    maker = make_exact if exact else make
    queries = maker(n_queries, query_tokens, width, seed=seed, device=device)
    items = maker(n_items, item_tokens, width, seed=seed + 1, device=device)
    grad = draw_grad(n_queries, n_items, device, seed)
    actual = backward(grad, queries, items, alpha=alpha, cut_back=ClimGradientSettings(block_sets, 32))
    if 0 in (query_tokens, item_tokens):
        assert not any(t.any() for t in actual)
    else:
        assert_close(actual, exact_gradient(grad, queries, items, alpha))
    assert [t.shape for t in actual] == [queries.shape, items.shape]


@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.0])
def test_gradient_at_the_sizes_of_a_model(device, alpha):
    queries, items = make(2, 40, 96, device=device), make(3, 52, 96, seed=1, device=device)
    grad = draw_grad(2, 3, device)
    actual = backward(grad, queries, items, alpha=alpha, cut=None, cut_back=None)
    assert_close(actual, exact_gradient(grad, queries, items, alpha))


def test_the_gradient_of_a_tie_goes_to_the_first(device):
    query = torch.zeros(1, 1, 16, device=device)
    query[..., 0] = 1.0
    grad_items = backward(torch.ones(1, 1, device=device), query, query.repeat(1, 3, 1), alpha=0.0)[1]
    # Every item row meets the query (a third each); the query's own maximum counts for the first of the three.
    assert grad_items[0, :, 0].tolist() == pytest.approx([4 / 3, 1 / 3, 1 / 3])


def test_a_maximum_of_zero_takes_the_slope(device):
    queries, items = torch.zeros(1, 1, 16, device=device), torch.zeros(1, 1, 16, device=device)
    items[..., 3] = 1.0
    grad_queries = backward(torch.ones(1, 1, device=device), queries, items, alpha=0.0)[0]
    assert grad_queries[0, 0, 3].item() == pytest.approx(0.2)


def test_both_sides_are_the_same_operation(device):
    queries, items = make(3, 7, 24, device=device), make(4, 5, 24, seed=1, device=device)
    grad = draw_grad(3, 4, device)
    unswapped, swapped = backward(grad, queries, items), backward(grad.T, items, queries)
    for unswapped_gradient, swapped_gradient in zip(unswapped, reversed(swapped), strict=True):
        torch.testing.assert_close(unswapped_gradient, swapped_gradient, rtol=0, atol=1e-6)


def test_strided_and_expanded_inputs(device):
    queries, items = make(3, 5, 24, device=device), make(6, 4, 24, seed=1, device=device)
    by_token = queries.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.stack([items, items], dim=-1)[..., 1]
    ones = torch.ones((), device=device).expand(3, 6)
    for views, copies in (
        ((ones, by_token, wide), (ones.clone(), queries, items)),
        ((ones, queries[:1].expand(3, -1, -1), items), (ones.clone(), queries[[0, 0, 0]], items)),
    ):
        for view_gradient, copy_gradient in zip(backward(*views), backward(*copies), strict=True):
            assert view_gradient.is_contiguous()
            assert torch.equal(view_gradient, copy_gradient)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's NumPy: infinity times zero
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stays_with_its_pair(device, value):
    queries, items = make(3, 5, 24, device=device), make(6, 4, 24, seed=1, device=device)
    grad = draw_grad(3, 6, device)
    clean = backward(grad, queries, items)
    grad[1, 4] = value
    for at, poisoned_gradient, clean_gradient in zip((1, 4), backward(grad, queries, items), clean, strict=True):
        assert not poisoned_gradient[at].isfinite().any()
        other_rows = torch.arange(len(poisoned_gradient)) != at
        assert torch.equal(poisoned_gradient[other_rows], clean_gradient[other_rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_at_most_twice_as_far_off_as_pytorch(device, dtype):
    queries, items = make(3, 5, 40, device=device).to(dtype), make(4, 6, 40, seed=1, device=device).to(dtype)
    grad = draw_grad(3, 4, device)
    actual, expected = backward(grad, queries, items), exact_gradient(grad, queries, items)
    leaves = [t.cpu().clone().requires_grad_() for t in (queries, items)]
    s = torch.einsum("qsd,ntd->qnst", *leaves)
    fine = F.leaky_relu(s.max(3).values, 0.1).mean(2) + F.leaky_relu(s.max(2).values, 0.1).mean(2)
    plain = torch.autograd.grad(((0.8 * s[..., 0, 0] + 0.2 * fine) * grad.to(dtype).cpu()).sum(), leaves)
    for actual_gradient, plain_gradient, true in zip(actual, plain, expected, strict=True):
        assert actual_gradient.dtype == dtype
        error, allowed = ((t.double().cpu() - true).abs().max().item() for t in (actual_gradient, plain_gradient))
        assert error <= 2 * allowed + torch.finfo(dtype).eps


def test_small_score_gradients_survive_float16(device):
    """A mean over many pairs can make each one's gradient smaller than float16 holds; their sum is not."""
    queries, items = make(1, 1, 16, device=device).half(), make(1, 1, 16, seed=1, device=device).half()
    repeated_items = items.expand(64, -1, -1)
    grad = torch.full((1, 64), 2.0**-25, device=device)
    grad_queries, _ = backward(grad, queries, repeated_items, alpha=1.0)
    torch.testing.assert_close(grad_queries[0, 0].float(), items[0, 0].float() * 2.0**-19, rtol=0, atol=2.0**-24)


def test_the_same_bits_at_every_run(device):
    queries, items = make(5, 7, 40, device=device), make(6, 4, 40, seed=1, device=device)
    grad = draw_grad(5, 6, device)
    first, second = backward(grad, queries, items), backward(grad, queries, items)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("queries", "items", "message"),
    [
        (torch.ones(1, 129, 16), torch.ones(1, 2, 16), "expected at most 128 query tokens, got 129: use"),
        (torch.ones(1, 2, 16), torch.ones(1, 129, 16), "expected at most 128 item tokens, got 129; use"),
        (torch.ones(1, 2, 16), torch.ones(1, 2, 15), r"expected queries \[Q, L_q, D\] and items \[N, L_i, D\], got"),
        (torch.ones(1, 2, 16).char(), torch.ones(1, 2, 16).char(), "expected float32, float16 or bfloat16 embeddings"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(device, queries, items, message):
    with pytest.raises(InputError, match=message):
        scores_with_winners(queries.to(device), items.to(device), alpha=0.8)


def test_winners_of_other_inputs_are_refused(device):
    queries, items = make(2, 3, 16, device=device), make(4, 5, 16, seed=1, device=device)
    _, *winners = scores_with_winners(queries, items, alpha=0.8, settings=SMALL)
    with pytest.raises(InputError, match=r"expected .* \[\[2, 4\], .*, got \[\[4, 2\], \[2, 4, 3\], \[2, 4, 5\]\]"):
        gradient(torch.ones(4, 2, device=device), queries, items, *winners, alpha=0.8)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors anywhere")
def test_tensors_on_the_cpu_are_refused():
    with pytest.raises(KernelError, match=r"got cpu: use finelip_fast\.kernels\.clim_scores"):
        scores_with_winners(torch.ones(1, 2, 16), torch.ones(1, 2, 16), alpha=0.8)


# Compiled for GPUs that are not here -----------------------------------------------------------------------------------


@cache
def compile_all(capability, dtype, width, tokens):
    """The scores that keep their winners, and the gradient of one side; that of the other is the same kernel."""
    from ahead_of_time import compile_launches

    queries, items = (torch.empty(512, tokens, width, dtype=dtype, device="meta") for _ in range(2))

    def run():
        scores, *winners = scores_with_winners(queries, items, alpha=0.8)
        gradient(scores, queries, items, *winners, alpha=0.8)

    winners, one_side, _ = compile_launches(capability, run)
    return {"winners": winners, "gradient": one_side}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize(
    "case", [(torch.float16, 512, 40), (torch.bfloat16, 768, 52), (torch.float32, 512, 40)], ids=str
)
@pytest.mark.parametrize("kernel", ["winners", "gradient"])
def test_the_kernels_fit_and_spill_nothing(capability, case, kernel):
    from ahead_of_time import SHARED_MEMORY_LIMIT

    compiled = compile_all(capability, *case)[kernel]
    assert compiled.shared_bytes <= SHARED_MEMORY_LIMIT[capability]
    assert compiled.spilled_bytes == 0
    assert not compiled.overwritten
    assert compiled.uses_wgmma is (capability == 90 and case[0] != torch.float32)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_pairs_and_rows_are_addressed_in_64_bits():
    ttir = compile_all(90, torch.float16, 512, 40)["gradient"].ttir
    for name in ("x_winners", "y_winners", "y", "grad_x"):
        base = re.search(rf"(%\S+) = tt\.splat %{name} :", ttir)
        assert base is not None, name
        moves = re.findall(rf"tt\.addptr {re.escape(base[1])}, \S+ : \S+, (\S+)", ttir)
        assert moves, name
        assert all("i64" in width for width in moves), name
