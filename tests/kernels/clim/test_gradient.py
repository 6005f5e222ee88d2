"""The gradient of late interaction in plain PyTorch, and how the operation is registered."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast.kernels import clim_scores, cpu
from finelip_fast.kernels.clim import gradient
from finelip_fast.kernels.clim import ops as clim


def rows(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def exact(queries, items, grad_scores, alpha):
    """Scores and gradients by autograd in float64; ties go to the first, as ``max(dim)`` sends them."""
    a, b = (side.double().detach().requires_grad_() for side in (queries, items))
    similarity = torch.einsum("qsd,ntd->qnst", a, b)
    fine = sum(F.leaky_relu(similarity.max(dim=axis).values, 0.1).mean(dim=-1) for axis in (2, 3))
    scores = alpha * similarity[:, :, 0, 0] + (1 - alpha) * fine
    return scores.detach(), *torch.autograd.grad(scores, (a, b), grad_scores.double())


def assert_near(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, top) for top in (4, 9, 5, 9, 24))),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    tile=st.sampled_from([1, 200, 1 << 24]),
)
def test_equals_float64_whatever_the_blocks(sizes, alpha, tile):
    n_queries, query_tokens, n_items, item_tokens, width = sizes
    queries = rows(n_queries, query_tokens, width).requires_grad_()
    items = rows(n_items, item_tokens, width, seed=1).requires_grad_()
    grad = torch.randn(n_queries, n_items, generator=torch.Generator().manual_seed(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient, "_CPU_ELEMENTS", tile)
        scores = clim_scores(queries, items, alpha=alpha)
        gradients = torch.autograd.grad(scores, (queries, items), grad)
    expected, *expected_grads = exact(queries, items, grad, alpha)
    assert_near(scores.detach(), expected)
    for actual, expected_gradient in zip(gradients, expected_grads, strict=True):
        assert_near(actual, expected_gradient)


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_rounds_no_more_than_its_result(monkeypatch, dtype, instructions):
    if not instructions:
        monkeypatch.setattr(cpu, "has", lambda feature: False)
    queries = rows(9, 40, 96, dtype=dtype).requires_grad_()
    items = rows(17, 12, 96, seed=1, dtype=dtype).requires_grad_()
    grad = torch.randn(9, 17, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(clim_scores(queries, items), (queries, items), grad)
    for actual, expected_gradient in zip(gradients, exact(queries, items, grad, 0.8)[1:], strict=True):
        assert actual.dtype == dtype
        assert_near(actual, expected_gradient, torch.finfo(dtype).eps * expected_gradient.abs().max().item())


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300])
def test_any_number_of_tokens(tokens):
    queries, items = rows(2, tokens, 8), rows(3, 5, 8, seed=1)
    grad = torch.ones(2, 3)
    for sides in ((queries, items), (items, queries)):
        a, b = (side.clone().requires_grad_() for side in sides)
        shape = len(a), len(b)
        gradients = torch.autograd.grad(clim_scores(a, b, alpha=0.2), (a, b), grad.reshape(shape))
        for actual, expected_gradient in zip(gradients, exact(a, b, grad.reshape(shape), 0.2)[1:], strict=True):
            assert_near(actual, expected_gradient)


def test_a_winner_takes_one_byte_up_to_128_tokens():
    scores, over_items, over_queries = gradient.scores_with_winners(rows(2, 128, 8), rows(3, 129, 8), alpha=0.8)
    assert scores.dtype == torch.float32
    assert (over_items.shape, over_items.dtype) == ((2, 3, 128), torch.int16)
    assert (over_queries.shape, over_queries.dtype) == ((2, 3, 129), torch.uint8)


def test_the_first_of_equals_wins_and_a_maximum_of_zero_is_sloped():
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).requires_grad_()
    items = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]]).requires_grad_()
    scores = clim_scores(queries, items, alpha=0.0)
    gradients = torch.autograd.grad(scores, (queries, items), torch.ones(1, 1))
    for actual, expected_gradient in zip(gradients, exact(queries, items, torch.ones(1, 1), 0.0)[1:], strict=True):
        assert_near(actual, expected_gradient)
    # Token 1 meets zeros only, the first of them in item token 0.
    assert gradients[1][0, 0, 1] == pytest.approx(0.1 / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_come_in_the_dtypes_of_the_inputs(dtype):
    queries, items = rows(2, 3, 16, dtype=dtype).requires_grad_(), rows(4, 5, 16, seed=1, dtype=dtype).requires_grad_()
    grad = torch.randn(2, 4, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad(clim_scores(queries, items), (queries, items), grad)
    for actual, expected_gradient in zip(gradients, exact(queries, items, grad, 0.8)[1:], strict=True):
        assert actual.dtype == dtype
        assert_near(actual, expected_gradient, 2 * torch.finfo(dtype).eps)


def test_only_the_side_that_asks_gets_a_gradient():
    queries, items = rows(2, 3, 8).requires_grad_(), rows(4, 5, 8)
    clim_scores(queries, items).sum().backward()
    assert queries.grad is not None
    assert items.grad is None


def test_the_same_bits_twice():
    def once():
        queries, items = rows(9, 7, 32).requires_grad_(), rows(8, 6, 32, seed=1).requires_grad_()
        return torch.autograd.grad(clim_scores(queries, items).sum(), (queries, items))

    assert all(torch.equal(first, second) for first, second in zip(once(), once(), strict=True))


# opcheck looks at the gradients of tensors that it made itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("tokens", [5, 130])
def test_operations_are_registered_as_pytorch_wants_them(tokens):
    queries, items = rows(2, 3, 8).requires_grad_(), rows(4, tokens, 8).requires_grad_()
    torch.library.opcheck(clim._scores, (queries.detach(), items.detach(), None, None, 0.8))
    torch.library.opcheck(clim._scores_with_winners, (queries, items, 0.8))
    winners = clim._scores_with_winners(queries.detach(), items.detach(), 0.8)
    torch.library.opcheck(clim._gradient, (torch.ones(2, 4), queries.detach(), items.detach(), *winners[1:], 0.8))


def test_the_compiled_gradient_is_the_same():
    def loss(queries, items):
        return clim_scores(queries, items, alpha=0.3).square().sum()

    sides = [[rows(2, 3, 8).requires_grad_(), rows(4, 5, 8, seed=1).requires_grad_()] for _ in range(2)]
    loss(*sides[0]).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*sides[1]).backward()
    for plain, compiled in zip(*sides, strict=True):
        torch.testing.assert_close(compiled.grad, plain.grad, rtol=1e-5, atol=1e-6)
