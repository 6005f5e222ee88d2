"""Token aggregation: the formula, its invariances, its gradient, low precision, and what is refused."""

from __future__ import annotations

import doctest
import importlib
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast.errors import InputError
from finelip_fast.kernels import atrm
from finelip_fast.kernels.atrm.formula import AtrmInputs, aggregation_weights, atrm_reference

NAMES = ("norm_weight", "norm_bias", "w1", "b1", "w2", "b2", "scale")


def make(tokens, width, *, batch=3, hidden=5, aggregated=4, seed=0, device="cpu", scale=2.0):
    """Random ``(x, parameters, anchor)``; the parameters in `atrm`'s order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    parameters = [
        1 + 0.3 * draw(width),
        0.3 * draw(width),
        draw(hidden, width) / math.sqrt(width),
        0.3 * draw(hidden),
        draw(aggregated, hidden),
        0.3 * draw(aggregated),
        torch.tensor(scale),
    ]
    x, anchor = draw(batch, tokens, width), draw(batch, width)
    return x.to(device), [parameter.to(device) for parameter in parameters], anchor.to(device)


def expected_embeddings(method, x, parameters, anchor, lengths=None):
    x, anchor, *parameters = (t.detach().double().cpu().numpy() for t in (x, anchor, *parameters))
    *parameters, scale = parameters
    lengths = [x.shape[1]] * len(x) if lengths is None else lengths
    rows = [
        method.atrm(item[:n], first, *parameters, scale.item())
        for item, first, n in zip(x, anchor, lengths, strict=True)
    ]
    return np.stack(rows) if rows else np.zeros((0, len(parameters[-1]) + 1, x.shape[2]))


def largest_error(actual, expected):
    return float(np.abs(actual.detach().double().cpu().numpy() - expected).max(initial=0.0))


@st.composite
def cases(draw):
    tokens = draw(st.integers(0, 33))
    lengths = draw(st.one_of(st.none(), st.lists(st.integers(0, tokens), max_size=4)))
    return {
        "tokens": tokens,
        "lengths": lengths,
        "batch": draw(st.integers(0, 4)) if lengths is None else len(lengths),
        "width": draw(st.integers(8, 96)),
        "hidden": draw(st.integers(1, 19)),
        "aggregated": draw(st.integers(1, 17)),
        "scale": draw(st.sampled_from([-1.5, 0.0, 1.0, 4.0])),
        "seed": draw(st.integers(0, 2**16)),
    }


@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_equals_the_method(method, device, case):
    lengths = case.pop("lengths")
    x, parameters, anchor = make(**case, device=device)
    counts = None if lengths is None else torch.tensor(lengths, dtype=torch.int64, device=device)
    out = atrm(x, *parameters, lengths=counts, anchor=anchor)
    expected = expected_embeddings(method, x, parameters, anchor, lengths)
    assert out.shape == expected.shape
    assert out.dtype == torch.float32
    assert largest_error(out, expected) <= 1e-5


# ``(N, D, h, K, lengths)`` about those of models: patches of a picture, ragged texts, odd sizes, every width of CLIP.
MODEL_SIZES = [
    (196, 512, 102, 39, None),
    (255, 768, 153, 51, [255, 1, 17]),
    (257, 640, 128, 40, [1, 256, 257]),
    (49, 96, 19, 9, None),
    (77, 1280, 256, 64, [77, 64, 3]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", MODEL_SIZES, ids=str)
def test_values_and_gradients_at_the_sizes_of_models(method, device, size, dtype):
    tokens, width, hidden, aggregated, lengths = size
    x, parameters, anchor = make(tokens, width, hidden=hidden, aggregated=aggregated, device=device, scale=0.3)
    counts = None if lengths is None else torch.tensor(lengths, device=device)
    leaves = [t.to(dtype).requires_grad_() for t in (x, anchor, *parameters)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    out = atrm(leaves[0], *leaves[2:], lengths=counts, anchor=leaves[1])
    plain = atrm_reference(AtrmInputs(leaves[0], *leaves[2:], counts, leaves[1]))
    true = in_float64(exact[0], *exact[2:], lengths or [tokens] * 3, exact[1])
    floor = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert largest_error(out, true.detach().cpu().numpy()) <= floor
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
    actual, autograd = (torch.autograd.grad((rows * weights).sum(), leaves) for rows in (out, plain))
    expected = torch.autograd.grad((true * weights.double()).sum(), exact)
    for name, grad, reference_grad, best in zip(("x", "anchor", *NAMES), actual, autograd, expected, strict=True):
        assert grad.dtype == dtype, name
        error, reference_error = ((gradient.double() - best).abs().max().item() for gradient in (grad, reference_grad))
        # Twice PyTorch's own: the scale's gradient is a small sum of large terms.
        assert error <= 2 * reference_error + floor * max(1.0, best.abs().max().item()), name


@given(tokens=st.integers(1, 20), width=st.integers(8, 96), seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_the_order_of_tokens_does_not_matter(device, tokens, width, seed):
    x, parameters, anchor = make(tokens, width, seed=seed, device=device)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed)).to(device)
    torch.testing.assert_close(
        atrm(x[:, order], *parameters, anchor=anchor), atrm(x, *parameters, anchor=anchor), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("poison", [0.0, 1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("padding", [1, 7, 64])
def test_padding_is_never_looked_at(device, padding, poison):
    x, parameters, anchor = make(11, 24, device=device)
    padded = torch.cat([x, torch.full((3, padding, 24), poison, device=device)], dim=1)
    lengths = torch.full((3,), 11, device=device)
    torch.testing.assert_close(
        atrm(padded, *parameters, lengths=lengths, anchor=anchor),
        atrm(x, *parameters, anchor=anchor),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("poison", [1e30, math.inf, math.nan])
def test_padding_takes_no_part_in_the_gradient(device, poison):
    x, parameters, anchor = make(9, 16, device=device)
    lengths = torch.tensor([4, 0, 9], device=device)
    padding = torch.arange(9, device=device) >= lengths[:, None]
    weights = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)).to(device)
    gradients = []
    for value in (0.0, poison):
        filled = x.masked_fill(padding[..., None], value)
        leaves = [t.clone().requires_grad_() for t in (filled, anchor, *parameters)]
        out = atrm(leaves[0], *leaves[2:], lengths=lengths, anchor=leaves[1])
        gradients.append(torch.autograd.grad((out * weights).sum(), leaves))
    for name, clean, poisoned in zip(("x", "anchor", *NAMES), *gradients, strict=True):
        torch.testing.assert_close(poisoned, clean, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert not gradients[1][0][padding].any()


def test_lengths_of_every_integer_type_are_taken(device):
    x, parameters, anchor = make(7, 16, device=device)
    lengths = torch.tensor([7, 3, 1], device=device)
    expected = atrm(x, *parameters, lengths=lengths, anchor=anchor)
    assert torch.equal(atrm(x, *parameters, lengths=lengths.int(), anchor=anchor), expected)


@pytest.mark.parametrize("tokens", [0, 5])
def test_an_item_without_tokens_has_zero_rows_after_its_anchor(device, tokens):
    x, parameters, anchor = make(tokens, 16, device=device)
    out = atrm(x, *parameters, lengths=torch.zeros(3, dtype=torch.int64, device=device), anchor=anchor)
    torch.testing.assert_close(out[:, 0], F.normalize(anchor, dim=-1))
    assert not out[:, 1:].any()


def test_every_row_has_unit_length(device):
    x, parameters, anchor = make(13, 40, device=device)
    norms = atrm(100 * x, *parameters, anchor=0.01 * anchor).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)


def test_the_softmax_survives_a_large_scale(device):
    x, parameters, anchor = make(13, 40, device=device, scale=1e4)
    out = atrm(x, *parameters, anchor=anchor)
    assert out.isfinite().all()
    # One token takes all the weight: every aggregated row is one of the item's own tokens.
    nearest = (out[:, 1:] @ F.normalize(x, dim=-1).transpose(1, 2)).amax(dim=-1)
    torch.testing.assert_close(nearest, torch.ones_like(nearest), rtol=0, atol=1e-5)


def in_float64(x, norm_weight, norm_bias, w1, b1, w2, b2, scale, lengths, anchor):
    """The formula, item by item, for autograd in float64."""
    embeddings = []
    for item, first, length in zip(x, anchor, lengths, strict=True):
        tokens = item[:length]
        centred = tokens - tokens.mean(dim=1, keepdim=True)
        normed = centred * (centred.square().mean(dim=1, keepdim=True) + 1e-5).rsqrt() * norm_weight + norm_bias
        pre = normed @ w1.T + b1
        logits = (pre * 0.5 * (1 + torch.erf(pre / math.sqrt(2))) @ w2.T + b2) * scale
        powers = logits.exp()
        rows = torch.cat([first[None], (powers / powers.sum(dim=0)).T @ tokens])
        embeddings.append(rows / rows.square().sum(dim=1, keepdim=True).sqrt())
    return torch.stack(embeddings)


@pytest.mark.parametrize("tokens", [1, 6, 37])
@pytest.mark.parametrize("width", [8, 33])
def test_gradient_equals_float64s(device, tokens, width):
    x, parameters, anchor = make(tokens, width, device=device, hidden=6, aggregated=3)
    lengths = torch.tensor([tokens, (tokens + 1) // 2, 1], device=device)
    weights = torch.randn(3, 4, width, generator=torch.Generator().manual_seed(1)).to(device)
    leaves = [t.clone().requires_grad_() for t in (x, anchor, *parameters)]
    exact = [t.double().requires_grad_() for t in (x, anchor, *parameters)]
    out = atrm(leaves[0], *leaves[2:], lengths=lengths, anchor=leaves[1])
    true = in_float64(exact[0], *exact[2:], lengths.tolist(), exact[1])
    actual = torch.autograd.grad((out * weights).sum(), leaves)
    expected = torch.autograd.grad((true * weights.double()).sum(), exact)
    for name, grad, expected_grad in zip(("x", "anchor", *NAMES), actual, expected, strict=True):
        error = (grad.double() - expected_grad).abs().max().item()
        assert error <= 1e-5 * max(1.0, expected_grad.abs().max().item()), name


def in_plain_pytorch(x, norm_weight, norm_bias, w1, b1, w2, b2, scale, anchor):
    """The formula in the inputs' dtype, as one would write it without care."""
    hidden = F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias), w1, b1))
    weights = (F.linear(hidden, w2, b2) * scale).softmax(dim=1)
    return F.normalize(torch.cat([anchor[:, None], weights.transpose(1, 2) @ x], dim=1), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (23, 65), (197, 128)])
def test_low_precision_is_at_most_twice_as_far_off_as_pytorch(method, device, dtype, tokens, width):
    x, parameters, anchor = make(tokens, width, device=device)
    x, anchor, *parameters = (t.to(dtype) for t in (x, anchor, *parameters))
    expected = expected_embeddings(method, x, parameters, anchor)
    out = atrm(x, *parameters, anchor=anchor)
    assert out.dtype == dtype
    plain = largest_error(in_plain_pytorch(x, *parameters, anchor), expected)
    assert largest_error(out, expected) <= 2 * plain + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_gradients_come_back_in_their_inputs_dtype(device, dtype):
    x, parameters, anchor = make(23, 64, device=device)
    leaves = [t.to(dtype).requires_grad_() for t in (x, anchor, *parameters)]
    wide = [t.detach().float().requires_grad_() for t in leaves]
    weights = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1)).to(device)
    actual = torch.autograd.grad((atrm(leaves[0], *leaves[2:], anchor=leaves[1]) * weights).sum(), leaves)
    expected = torch.autograd.grad((atrm(wide[0], *wide[2:], anchor=wide[1]) * weights).sum(), wide)
    for name, grad, expected_grad in zip(("x", "anchor", *NAMES), actual, expected, strict=True):
        assert grad.dtype == dtype, name
        error = (grad.float() - expected_grad).abs().max().item()
        assert error <= 4 * torch.finfo(dtype).eps * max(1.0, expected_grad.abs().max().item()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(device, dtype):
    x, parameters, anchor = make(23, 64, device=device)
    with torch.autocast(device, dtype=dtype):
        inside = atrm(x, *parameters, anchor=anchor)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, atrm(x, *parameters, anchor=anchor))


def test_strided_and_expanded_inputs(device):
    x, parameters, anchor = make(23, 64, device=device)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    views = [p.expand(2, *p.shape)[1] if p.dim() == 0 else torch.stack([p, p], dim=-1)[..., 0] for p in parameters]
    wide = torch.stack([anchor, anchor], dim=-1)[..., 1]
    assert not strided.is_contiguous()
    expected = atrm(x, *parameters, anchor=anchor)
    torch.testing.assert_close(atrm(strided, *views, anchor=wide), expected, rtol=0, atol=1e-6)
    expanded, first = x[:1].expand(3, -1, -1), anchor[:1].expand(3, -1)
    torch.testing.assert_close(
        atrm(expanded, *parameters, anchor=first), expected[:1].expand(3, -1, -1), rtol=0, atol=1e-6
    )


def test_cls_and_patches_as_slices_of_one_tensor(device):
    """How the model calls it: the anchor and the tokens are views of the encoder's output."""
    x, parameters, _ = make(24, 64, device=device)
    torch.testing.assert_close(
        atrm(x[:, 1:], *parameters, anchor=x[:, 0]),
        atrm(x[:, 1:].clone(), *parameters, anchor=x[:, 0].clone()),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
def test_scale_of_any_shape_of_one_element(device, shape):
    x, parameters, anchor = make(7, 16, device=device)
    expected = atrm(x, *parameters, anchor=anchor)
    assert torch.equal(atrm(x, *parameters[:-1], parameters[-1].reshape(shape), anchor=anchor), expected)


def test_the_graph_has_no_break(device):
    x, parameters, anchor = make(7, 16, device=device)
    lengths = torch.tensor([7, 0, 3], device=device)
    compiled = torch.compile(atrm, backend="aot_eager", fullgraph=True)
    expected = atrm(x, *parameters, lengths=lengths, anchor=anchor)
    torch.testing.assert_close(compiled(x, *parameters, lengths=lengths, anchor=anchor), expected, rtol=0, atol=1e-6)


def test_an_exported_program_has_operations_of_pytorch_alone(device):
    class Aggregate(torch.nn.Module):
        def forward(self, x, lengths, anchor):
            return atrm(x, *parameters, lengths=lengths, anchor=anchor)

    x, parameters, anchor = make(7, 16, device=device)
    lengths = torch.tensor([7, 3, 0], device=device)
    batch = torch.export.Dim("B")
    sizes = {"x": {0: batch}, "lengths": {0: batch}, "anchor": {0: batch}}
    program = torch.export.export(Aggregate(), (x, lengths, anchor), dynamic_shapes=sizes)
    assert not [node for node in program.graph.nodes if "finelip" in str(node.target)]
    smaller_batch = x[:2].flip(0), lengths[:2].flip(0), anchor[:2].flip(0)
    expected = atrm(smaller_batch[0], *parameters, lengths=smaller_batch[1], anchor=smaller_batch[2])
    torch.testing.assert_close(program.module()(*smaller_batch), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (3, 16), r"expected x \[B, N, D\] and anchor \[B, D\], got \(3, 16\) and \(3, 16\)"),
        ("anchor", (2, 16), r"expected x \[B, N, D\] and anchor \[B, D\], got \(3, 7, 16\) and \(2, 16\)"),
        ("anchor", (3, 1, 16), r"got \(3, 7, 16\) and \(3, 1, 16\)"),
        ("norm_weight", (15,), r"expected norm_weight of shape \[16\] for x \[3, 7, 16\], got \[15\]"),
        ("norm_bias", (1,), r"expected norm_bias of shape \[16\] for x \[3, 7, 16\], got \[1\]"),
        ("w1", (5, 15), r"expected w1 of shape \[5, 16\] for x \[3, 7, 16\], got \[5, 15\]"),
        ("b1", (4,), r"expected b1 of shape \[5\] for x \[3, 7, 16\], got \[4\]"),
        ("w2", (4, 6), r"expected w2 of shape \[4, 5\] for x \[3, 7, 16\], got \[4, 6\]"),
        ("b2", (5,), r"expected b2 of shape \[4\] for x \[3, 7, 16\], got \[5\]"),
        ("scale", (4,), r"expected scale to have one element, got \[4\]"),
        ("lengths", (2,), r"expected lengths \[3\], got \[2\]"),
        ("lengths", (3, 1), r"expected lengths \[3\], got \[3, 1\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, shape, message):
    x, parameters, anchor = make(7, 16)
    arguments = {"x": x, **dict(zip(NAMES, parameters, strict=True)), "anchor": anchor}
    arguments[name] = torch.ones(shape, dtype=torch.int64 if name == "lengths" else torch.float32)
    with pytest.raises(InputError, match=message):
        atrm(**arguments)


@pytest.mark.parametrize("lengths", [None, [3, 7, 1]], ids=str)
def test_the_weights_are_what_the_rows_are_mixed_of(lengths):
    x, parameters, anchor = make(7, 16)
    lengths = None if lengths is None else torch.tensor(lengths)
    weights = aggregation_weights(AtrmInputs(x, *parameters, lengths, anchor))
    assert weights.shape == (3, 7, 4)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3, 4))
    if lengths is not None:
        assert not weights[torch.arange(7) >= lengths[:, None]].any()
    rows = F.normalize(weights.transpose(1, 2) @ x, dim=-1)
    torch.testing.assert_close(rows, atrm(x, *parameters, lengths=lengths, anchor=anchor)[:, 1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("lengths", [None, [3, 0, 7, 2, 0]], ids=str)
@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_blocks_of_items_change_nothing(monkeypatch, lengths, at_once):
    x, parameters, anchor = make(7, 16, batch=5)
    lengths = None if lengths is None else torch.tensor(lengths)
    expected = atrm_reference(AtrmInputs(x, *parameters, lengths, anchor))
    monkeypatch.setattr(sys.modules["finelip_fast.kernels.atrm.ops"], "_BLOCK_ELEMENTS", at_once * 7 * 16)
    torch.testing.assert_close(atrm(x, *parameters, lengths=lengths, anchor=anchor), expected, rtol=0, atol=1e-6)


def test_docstring_example():
    # By import_module: in the package, the module's name is the function's.
    results = doctest.testmod(importlib.import_module("finelip_fast.kernels.atrm.ops"))
    assert results.attempted > 0
    assert results.failed == 0
