"""Every derivative of the two operations that PyTorch can compute is right, and a search refuses all of them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from finelip_fast.errors import KernelError
from finelip_fast.kernels import (
    atrm,
    clim_scores,
    clim_topk,
    clim_topk_int8,
    cosine_candidates,
    quantize,
    quantize_items,
)
from finelip_fast.kernels.clim import formula
from finelip_fast.kernels.clim import gradient as clim_gradient

# PyTorch scripts its own forward-mode rules when the first one is used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def like(inputs, seed=100):
    return tuple(randn(*tensor.shape, seed=seed + at).to(tensor.dtype) for at, tensor in enumerate(inputs))


def assert_near(actual, expected, tolerance=1e-5):
    expected = expected.double()
    limit = tolerance * max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=limit)


class Clim:
    """Late interaction, and a float64 version for PyTorch to differentiate."""

    tolerance = 1e-5

    def __init__(self, shape=(2, 3, 4, 5, 8), alpha=0.3, dtype=torch.float32):
        n_queries, query_tokens, n_items, item_tokens, width = shape
        sides = randn(n_queries, query_tokens, width), randn(n_items, item_tokens, width, seed=1)
        self.inputs = tuple(F.normalize(side, dim=-1).to(dtype) for side in sides)
        self.alpha = alpha

    def run(self, queries, items):
        return clim_scores(queries, items, alpha=self.alpha)

    def exact(self, queries, items):
        similarity = torch.einsum("qsd,ntd->qnst", queries, items)
        fine = sum(F.leaky_relu(similarity.max(dim=axis).values, 0.1).mean(dim=-1) for axis in (2, 3))
        return self.alpha * similarity[:, :, 0, 0] + (1 - self.alpha) * fine


class Atrm:
    """Token aggregation, and a float64 version for PyTorch to differentiate."""

    tolerance = 5e-5

    def __init__(self, lengths=(6, 2, 0), tokens=6, width=8, dtype=torch.float32):
        batch, hidden, aggregated = len(lengths), 5, 3
        shapes = [(batch, tokens, width), (width,), (width,), (hidden, width), (hidden,), (aggregated, hidden)]
        shapes += [(aggregated,), (), (batch, width)]
        self.inputs = tuple(randn(*shape, seed=at).to(dtype) for at, shape in enumerate(shapes))
        self.lengths = torch.tensor(lengths, dtype=torch.int64)

    def run(self, *inputs):
        return atrm(*inputs[:-1], lengths=self.lengths, anchor=inputs[-1])

    def exact(self, x, norm_weight, norm_bias, w1, b1, w2, b2, scale, anchor):
        embeddings = []
        for item, first, length in zip(x, anchor, self.lengths.tolist(), strict=True):
            tokens = item[:length]
            pre = F.layer_norm(tokens, tokens.shape[1:], norm_weight, norm_bias) @ w1.T + b1
            logits = (pre * 0.5 * (1 + torch.erf(pre / math.sqrt(2))) @ w2.T + b2) * scale
            mixed = logits.softmax(dim=0).T @ tokens
            rows = torch.cat([first[None], mixed])
            norms = rows.square().sum(dim=1, keepdim=True)
            embeddings.append(rows / norms.where(norms > 0, 1.0).sqrt())
        return torch.stack(embeddings)


@pytest.fixture(params=[Clim, Atrm], ids=["clim", "atrm"])
def operation(request):
    return request.param()


def doubled(tensors):
    return tuple(tensor.double() for tensor in tensors)


def dual(function, inputs, tangents):
    """Return the tangent through PyTorch's other forward-mode interface."""
    with forward_ad.dual_level():
        result = function(*map(forward_ad.make_dual, inputs, tangents))
        return forward_ad.unpack_dual(result).tangent


def tangent(function, inputs, tangents):
    return jvp(function, inputs, tangents)[1]


@pytest.mark.parametrize("forward", [tangent, dual])
def test_tangents_equal_float64s(operation, forward):
    tangents = like(operation.inputs)
    expected = tangent(operation.exact, doubled(operation.inputs), doubled(tangents))
    assert_near(forward(operation.run, operation.inputs, tangents), expected, operation.tolerance)


def test_the_tangent_of_each_input_alone_equals_float64s(operation):
    for at in range(len(operation.inputs)):
        tangents = [torch.zeros_like(tensor) for tensor in operation.inputs]
        tangents[at] = like(operation.inputs)[at]
        expected = tangent(operation.exact, doubled(operation.inputs), doubled(tangents))
        if at != 6:  # b2 is shared by all tokens, so softmax ignores it
            assert expected.abs().max() > 0.01
        assert_near(tangent(operation.run, operation.inputs, tuple(tangents)), expected, operation.tolerance)


@pytest.mark.parametrize("kind", [Clim, Atrm], ids=["clim", "atrm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tangents_in_low_precision(kind, dtype):
    operation = kind(dtype=dtype)
    tangents = like(operation.inputs)
    expected = tangent(operation.exact, doubled(operation.inputs), doubled(tangents))
    actual = tangent(operation.run, operation.inputs, tangents)
    assert_near(actual, expected, 4 * torch.finfo(actual.dtype).eps + operation.tolerance)


def test_both_modes_give_one_jacobian(operation):
    argnums = tuple(range(len(operation.inputs)))
    expected = jacrev(operation.exact, argnums=argnums)(*doubled(operation.inputs))
    for mode in (jacrev, jacfwd):
        for jacobian, expected_jacobian in zip(
            mode(operation.run, argnums=argnums)(*operation.inputs), expected, strict=True
        ):
            assert_near(jacobian, expected_jacobian, operation.tolerance)


def loss_of(function):
    return lambda *inputs: function(*inputs).pow(3).sum()


def test_hessians_equal_float64s(operation):
    at = 0 if isinstance(operation, Clim) else 3
    expected = hessian(loss_of(operation.exact), argnums=at)(*doubled(operation.inputs))
    assert_near(hessian(loss_of(operation.run), argnums=at)(*operation.inputs), expected, 10 * operation.tolerance)


def twice(function, inputs):
    """Return the gradient of the squared gradient, as in a gradient penalty."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    first = torch.autograd.grad(loss_of(function)(*leaves), leaves, create_graph=True)
    return *first, *torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)


def test_gradients_of_gradients_equal_float64s(operation):
    expected = twice(operation.exact, doubled(operation.inputs))
    for gradient, expected_gradient in zip(twice(operation.run, operation.inputs), expected, strict=True):
        assert_near(gradient, expected_gradient, 10 * operation.tolerance)


def test_tangents_of_gradients_equal_float64s(operation):
    """Forward over reverse, with leaves that require a gradient and carry a tangent."""

    def product(function, inputs, tangents):
        with forward_ad.dual_level():
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            loss = loss_of(function)(*map(forward_ad.make_dual, leaves, tangents))
            return [forward_ad.unpack_dual(gradient).tangent for gradient in torch.autograd.grad(loss, leaves)]

    expected = product(operation.exact, doubled(operation.inputs), doubled(like(operation.inputs)))
    for actual, exact in zip(product(operation.run, operation.inputs, like(operation.inputs)), expected, strict=True):
        assert_near(actual, exact, 10 * operation.tolerance)


def test_a_tangent_of_what_comes_back_reaches_the_gradient(operation):
    """The scores are computed before, without a tangent; only the incoming gradient is dual."""
    leaves = [tensor.clone().requires_grad_() for tensor in operation.inputs]
    result = operation.run(*leaves)
    back = torch.ones_like(result), randn(*result.shape, seed=3).float()
    with forward_ad.dual_level():
        gradients = torch.autograd.grad(result, leaves, forward_ad.make_dual(*back), retain_graph=True)
        tangents = [forward_ad.unpack_dual(gradient).tangent for gradient in gradients]
    for actual, expected in zip(tangents, torch.autograd.grad(result, leaves, back[1]), strict=True):
        assert_near(actual, expected, operation.tolerance)


def test_gradients_in_batches_equal_those_one_by_one(operation):
    leaves = [tensor.clone().requires_grad_() for tensor in operation.inputs]
    result = operation.run(*leaves)
    back = randn(4, *result.shape).float()
    batched = torch.autograd.grad(result, leaves, back, retain_graph=True, is_grads_batched=True)
    for at, vector in enumerate(back):
        for gradients, expected in zip(
            batched, torch.autograd.grad(result, leaves, vector, retain_graph=True), strict=True
        ):
            assert_near(gradients[at], expected, operation.tolerance)


def test_vmap_equals_a_loop(operation):
    batches = tuple(torch.stack([tensor, 0.5 * tensor, -tensor]) for tensor in operation.inputs)
    for function in (operation.run, grad(loss_of(operation.run))):
        expected = torch.stack([function(*inputs) for inputs in zip(*batches, strict=True)])
        assert_near(vmap(function)(*batches), expected, operation.tolerance)


def test_legacy_products_equal_float64s(operation):
    at = len(operation.inputs) - 1
    rest, last = operation.inputs[:-1], operation.inputs[-1]
    vector = like(operation.inputs)[at]

    def hvp(function, rest, last, vector):
        return torch.autograd.functional.hvp(lambda last: loss_of(function)(*rest, last), last, vector)[1]

    expected = hvp(operation.exact, doubled(rest), last.double(), vector.double())
    assert_near(hvp(operation.run, rest, last, vector), expected, 10 * operation.tolerance)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(0, top) for top in (3, 5, 4, 7))),
    width=st.integers(1, 12),
    alpha=st.floats(0, 1),
    tile=st.sampled_from([1, 200, 1 << 24]),
)
def test_forward_meets_reverse_in_late_interaction(sizes, width, alpha, tile):
    operation = Clim((*sizes, width), alpha)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formula, "TILE_ELEMENTS", tile)
        patch.setattr(clim_gradient, "_CPU_ELEMENTS", tile)
        assert_modes_meet(operation)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(-1, 9), min_size=0, max_size=4), tokens=st.integers(0, 7), width=st.integers(2, 12))
def test_forward_meets_reverse_in_token_aggregation(lengths, tokens, width):
    assert_modes_meet(Atrm(lengths, tokens, width))


def assert_modes_meet(operation):
    """Check ``u . (J v) = (J^T u) . v``: the left side by the reference, the right side by the kernels."""
    tangents = like(operation.inputs)
    leaves = [tensor.clone().requires_grad_() for tensor in operation.inputs]
    result = operation.run(*leaves)
    back = randn(*result.shape, seed=7).float()
    forwards = (tangent(operation.run, operation.inputs, tangents) * back).sum()
    if not result.requires_grad:  # scores of empty sets are constants
        assert forwards == 0
        return
    grads = torch.autograd.grad(result, leaves, back, allow_unused=True, materialize_grads=True)
    pairs = [(gradient * along).double().sum() for gradient, along in zip(grads, tangents, strict=True)]
    size = sum(gradient.norm() * along.norm() for gradient, along in zip(grads, tangents, strict=True))
    torch.testing.assert_close(forwards.double(), sum(pairs), rtol=0, atol=1e-4 * max(1.0, float(size)))


@pytest.mark.parametrize("inside", [True, False], ids=["compiled around", "compiled inside"])
def test_compiled_tangents_are_no_zeros(operation, inside):
    tangents = like(operation.inputs)
    expected = tangent(operation.run, operation.inputs, tangents)
    torch.compiler.reset()
    if inside:
        actual = torch.compile(lambda *arguments: tangent(operation.run, *arguments), backend="aot_eager")(
            operation.inputs, tangents
        )
        assert_near(actual, expected)
        return
    compiled = torch.compile(operation.run, backend="aot_eager")
    compiled(*operation.inputs)  # the graph for tensors without tangents must not be reused for those with tangents
    assert_near(tangent(compiled, operation.inputs, tangents), expected)
    assert_near(dual(compiled, operation.inputs, tangents), expected)
    assert_near(grad(loss_of(compiled))(*operation.inputs), grad(loss_of(operation.run))(*operation.inputs))


def test_a_compiled_gradient_of_a_gradient_is_refused(operation):
    torch.compiler.reset()
    compiled = torch.compile(operation.run, backend="aot_eager")
    with pytest.raises(RuntimeError, match="double backward"):
        twice(compiled, operation.inputs)


def test_scales_have_gradients_and_tangents():
    queries, items = Clim().inputs
    (left, left_scales), (right, right_scales) = quantize(queries), quantize(items)

    def run(left_scales, right_scales):
        return clim_scores(left, right, query_scales=left_scales, item_scales=right_scales)

    def exact(left_scales, right_scales):
        return Clim(alpha=0.8).exact(left * left_scales[..., None], right * right_scales[..., None])

    scales = left_scales, right_scales
    tangents = like(scales)
    assert_near(tangent(run, scales, tangents), tangent(exact, doubled(scales), doubled(tangents)))
    leaves = [scale.clone().requires_grad_() for scale in scales]
    wide = [scale.double().requires_grad_() for scale in scales]
    expected = torch.autograd.grad(exact(*wide).sum(), wide)
    for gradient, expected_gradient in zip(torch.autograd.grad(run(*leaves).sum(), leaves), expected, strict=True):
        assert_near(gradient, expected_gradient)


@pytest.fixture
def plain_attention():
    """Use plain attention, because PyTorch's fused ones raise in forward mode."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.backends.mha.set_fastpath_enabled(enabled)


def test_the_models_loss_has_a_tangent(make_model, make_captions, plain_attention):
    model = make_model().eval()
    pixels, ids = randn(2, 3, 32, 32).float(), make_captions([9, 5], 12)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    directions = dict(zip(parameters, like(parameters.values()), strict=True))

    def loss(parameters):
        images, texts, scale, *_ = functional_call(model, parameters, (pixels, ids))
        return F.cross_entropy(scale * model.score(images, texts), torch.arange(2))

    forwards = jvp(loss, (parameters,), (directions,))[1]
    for value in model.parameters():
        value.requires_grad_()
    loss(dict(model.named_parameters())).backward()  # uses the kernels
    backwards = sum((value.grad * directions[name]).sum() for name, value in model.named_parameters())
    assert forwards.abs() > 1e-3
    torch.testing.assert_close(forwards, backwards, rtol=1e-3, atol=1e-5)


_, ITEMS = Clim().inputs
SEARCHES = {
    "clim_topk": lambda queries, items: clim_topk(queries, items, 2)[0],
    "clim_topk of pieces": lambda queries, items: clim_topk(queries, [items, items], 2)[0],
    "clim_topk_int8": lambda queries, items: clim_topk_int8(queries, items, quantize_items(ITEMS), 2)[0],
    "cosine_candidates": lambda queries, items: cosine_candidates(queries[:, 0], *quantize(ITEMS[:, 0]), 2),
}


@pytest.mark.parametrize("side", [0, 1], ids=["queries", "items"])
@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_refuses_what_is_transformed(name, side):
    if (name, side) == ("cosine_candidates", 1):
        pytest.skip("its items are integers")
    sides = Clim().inputs

    def search(rows):
        return SEARCHES[name](*(rows if at == side else plain_rows for at, plain_rows in enumerate(sides)))

    rows, along = sides[side], torch.ones_like(sides[side])
    ways = {
        "jvp": lambda: jvp(search, (rows,), (along,)),
        "dual": lambda: dual(search, (rows,), (along,)),
        "grad": lambda: grad(lambda rows: search(rows).sum())(rows),
        "vmap": lambda: vmap(search)(rows[None]),
    }
    for way in ways.values():
        with pytest.raises(
            KernelError, match=f"{name.split()[0]} has no derivative.* support jvp, grad or vmap; search outside"
        ):
            way()


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_beside_a_transformation_is_a_search(name):
    with forward_ad.dual_level():
        beside = SEARCHES[name](*Clim().inputs)
    assert torch.equal(beside, SEARCHES[name](*Clim().inputs))
