"""The gradient of token aggregation's kernels: equal to float64's, and compiled for GPUs that are not here.

Runs on a GPU, or on the CPU by Triton's interpreter: ``TRITON_INTERPRET=1 pytest tests/kernels -m triton``.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from finelip_fast.errors import KernelError
from finelip_fast.kernels.atrm import gradient_triton as kernels
from finelip_fast.kernels.atrm.formula import AtrmInputs
from finelip_fast.kernels.atrm.gradient_triton import AtrmGradientSettings, gradient

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_memory")]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = ("x", "norm_weight", "norm_bias", "w1", "b1", "w2", "b2", "scale", "anchor")
SMALL = AtrmGradientSettings(
    row_rows=16,
    row_tokens=16,
    row_width=32,
    row_warps=4,
    row_stages=2,
    token_tokens=16,
    token_width=32,
    token_warps=4,
    token_stages=2,
)


def make(tokens, width, *, lengths=None, batch=3, hidden=5, aggregated=4, seed=0, device="cpu", scale=()):
    """Random ``(grad_out, arguments)``; the arguments in `gradient`'s order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = [
        draw(batch, tokens, width),
        1 + 0.3 * draw(width),
        0.3 * draw(width),
        draw(hidden, width) / math.sqrt(width),
        0.3 * draw(hidden),
        draw(aggregated, hidden),
        0.3 * draw(aggregated),
        torch.full(scale, 2.0),
        None if lengths is None else torch.tensor(lengths, dtype=torch.int64),
        draw(batch, width),
    ]
    grad_out = draw(batch, aggregated + 1, width)
    return grad_out.to(device), [None if tensor is None else tensor.to(device) for tensor in tensors]


def formula(x, norm_weight, norm_bias, w1, b1, w2, b2, scale, lengths, anchor):
    """The operation, item by item, in the dtype of its arguments."""
    items = []
    for item, tokens in enumerate(x):
        tokens = tokens if lengths is None else tokens[: lengths[item]]
        normed = F.layer_norm(tokens, tokens.shape[1:], norm_weight, norm_bias)
        logits = F.linear(F.gelu(F.linear(normed, w1, b1)), w2, b2) * scale.reshape(())
        pooled = logits.softmax(dim=0).T @ tokens
        items.append(F.normalize(torch.cat([anchor[item, None], pooled]), dim=-1))
    return torch.stack(items)


def by_autograd(grad_out, arguments, dtype):
    """The gradients by autograd of the formula in `dtype`; an item without tokens gives none to them."""
    *tensors, lengths, anchor = arguments
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (*tensors, anchor)]
    out = formula(*leaves[:-1], lengths, leaves[-1])
    return torch.autograd.grad(out, leaves, grad_out.to(dtype))


def errors(actual, expected):
    """The largest error of each gradient beside the gradient's largest value, and at least beside 1."""
    return {
        name: (grad.double() - exact).abs().max().item() / max(1.0, exact.abs().max().item())
        for name, grad, exact in zip(NAMES, actual, expected, strict=True)
        if exact.numel()
    }


@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 1, "width": 8, "hidden": 1, "aggregated": 1},
        {"tokens": 20, "width": 40, "lengths": [20, 0, 17], "aggregated": 17, "scale": (1, 1, 1)},
        {"tokens": 33, "width": 96, "hidden": 19, "aggregated": 39, "batch": 1},
        {"tokens": 16, "width": 67, "lengths": [1, 16, 2], "hidden": 33},
    ],
    ids=str,
)
def test_equals_float64s(device, sizes):
    grad_out, arguments = make(**sizes, device=device)
    actual = gradient(grad_out, AtrmInputs(*arguments), settings=SMALL)
    expected = by_autograd(grad_out, arguments, torch.float64)
    for grad, exact in zip(actual, expected, strict=True):
        assert grad.dtype == torch.float32
        assert grad.shape == exact.shape
    assert max(errors(actual, expected).values()) <= 2e-5


@st.composite
def cases(draw):
    tokens = draw(st.integers(0, 20))
    lengths = draw(st.one_of(st.none(), st.lists(st.integers(0, tokens), max_size=3)))
    return {
        "tokens": tokens,
        "lengths": lengths,
        "batch": 2 if lengths is None else len(lengths),
        "width": draw(st.integers(8, 70)),
        "hidden": draw(st.integers(1, 20)),
        "aggregated": draw(st.integers(1, 20)),
        "seed": draw(st.integers(0, 2**16)),
    }


@given(case=cases().filter(lambda case: case["batch"] > 0))
@settings(max_examples=10, deadline=None)
def test_equals_float64s_at_any_size(device, case):
    grad_out, arguments = make(**case, device=device)
    actual = gradient(grad_out, AtrmInputs(*arguments), settings=SMALL)
    assert max(errors(actual, by_autograd(grad_out, arguments, torch.float64)).values()) <= 2e-5


@pytest.mark.parametrize("poison", [1e30, math.inf, math.nan])
def test_padding_takes_no_part(device, poison):
    grad_out, arguments = make(20, 24, lengths=[4, 0, 17], device=device)
    x, lengths = arguments[0], arguments[-2]
    padding = (torch.arange(20, device=device) >= lengths[:, None])[..., None]
    clean, poisoned = (
        gradient(grad_out, AtrmInputs(x.masked_fill(padding, value), *arguments[1:]), settings=SMALL)
        for value in (0.0, poison)
    )
    for grad, expected in zip(poisoned, clean, strict=True):
        assert torch.equal(grad, expected)
    assert not poisoned[0].masked_select(padding).any()


@pytest.mark.parametrize("elements", [1, 2 * 9 * 16, 3 * 9 * 16 + 1])
def test_blocks_of_items_change_nothing(monkeypatch, device, elements):
    grad_out, arguments = make(9, 16, lengths=[9, 0, 4, 7, 1], batch=5, device=device)
    expected = gradient(grad_out, AtrmInputs(*arguments), settings=SMALL)
    monkeypatch.setattr(kernels, "_BLOCK_ELEMENTS", elements)
    blocked = gradient(grad_out, AtrmInputs(*arguments), settings=SMALL)
    assert max(errors(blocked, expected).values()) <= 1e-6


@pytest.mark.parametrize(
    "change", [{"row_rows": 32, "row_tokens": 32, "row_width": 16}, {"token_tokens": 64, "token_width": 128}], ids=str
)
def test_how_the_work_is_cut_changes_nothing(device, change):
    grad_out, arguments = make(37, 72, lengths=[37, 30, 5], hidden=12, aggregated=21, device=device)
    expected = gradient(grad_out, AtrmInputs(*arguments), settings=SMALL)
    cut = gradient(grad_out, AtrmInputs(*arguments), settings=replace(SMALL, **change))
    assert max(errors(cut, expected).values()) <= 2e-5


def test_the_same_bits_every_time(device):
    grad_out, arguments = make(37, 40, lengths=[37, 30, 5], aggregated=21, device=device)
    first, second = (gradient(grad_out, AtrmInputs(*arguments)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_aggregated_tokens_only_the_anchor_gets_a_gradient(device):
    grad_out, arguments = make(5, 24, aggregated=0, device=device)
    of_x, *of_parameters, of_anchor = gradient(grad_out, AtrmInputs(*arguments))
    assert not any(grad.any() for grad in (of_x, *of_parameters))
    expected = by_autograd(grad_out, arguments, torch.float64)[-1]
    torch.testing.assert_close(of_anchor.double(), expected.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [{"batch": 0, "tokens": 5}, {"batch": 2, "tokens": 0}], ids=str)
def test_without_tokens_only_the_anchor_gets_a_gradient(device, sizes):
    grad_out, arguments = make(width=16, **sizes, device=device)
    actual = dict(zip(NAMES, gradient(grad_out, AtrmInputs(*arguments), settings=SMALL), strict=True))
    anchor = actual.pop("anchor")
    assert anchor.shape == (sizes["batch"], 16)
    assert anchor.isfinite().all()
    for name, grad in actual.items():
        assert torch.equal(grad, torch.zeros_like(grad)), name


def test_rows_of_length_zero_get_what_autograd_gives_them(device):
    """The norm stops at 1e-12: below, the gradient is the incoming one over 1e-12."""
    grad_out, arguments = make(9, 16, device=device)
    arguments[0][1], arguments[-1][2] = 0.0, 0.0
    actual = gradient(grad_out, AtrmInputs(*arguments), settings=SMALL)
    expected = by_autograd(grad_out, arguments, torch.float64)
    assert errors(actual, expected)["x"] <= 1e-6
    for grad, exact in ((actual[0], expected[0]), (actual[-1], expected[-1])):
        assert grad.abs().amax(dim=-1).max() > 1e9
        for item in range(3):
            torch.testing.assert_close(grad[item].double(), exact[item], rtol=1e-4, atol=1e-5)


def in_plain_pytorch(grad_out, arguments):
    """Gradients by autograd in the arguments' own dtype, as one would write it without care."""
    return by_autograd(grad_out, arguments, arguments[0].dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_at_most_twice_as_far_off_as_pytorch(device, dtype, mean):
    """The worst of several draws on both sides: one draw's rounding is luck, and differs between processors' products."""
    kernel_errors, plain_errors = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)
    for seed in range(8):
        grad_out, arguments = make(23, 65, lengths=[23, 7, 16], device=device, seed=seed)
        arguments[0] += mean
        grad_out = grad_out.to(dtype)
        arguments = [a.to(dtype) if a is not None and a.is_floating_point() else a for a in arguments]
        expected = by_autograd(grad_out, arguments, torch.float64)
        actual = gradient(grad_out, AtrmInputs(*arguments), settings=SMALL)
        assert all(grad.dtype == dtype for grad in actual)
        for worst, grads in ((kernel_errors, actual), (plain_errors, in_plain_pytorch(grad_out, arguments))):
            worst.update({name: max(error, worst[name]) for name, error in errors(grads, expected).items()})
    slack = torch.finfo(dtype).eps + 2e-6
    if (
        INTERPRETED
    ):  # its products are NumPy's, which sum less exactly with AVX-512 than PyTorch's: by a rounding of the mean
        slack += mean * torch.finfo(torch.float32).eps
    for name, error in kernel_errors.items():
        assert error <= 2 * plain_errors[name] + slack, name


def test_each_gradient_has_its_own_tensors_dtype(device):
    grad_out, arguments = make(9, 16, device=device)
    arguments[0] = arguments[0].half()
    x, *rest = gradient(grad_out.half(), AtrmInputs(*arguments), settings=SMALL)
    assert x.dtype == torch.float16
    assert all(grad.dtype == torch.float32 for grad in rest)
    expected = by_autograd(grad_out.half(), arguments, torch.float64)
    assert max(errors((x, *rest), expected).values()) <= 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(device, dtype):
    grad_out, arguments = make(9, 16, device=device)
    expected = gradient(grad_out, AtrmInputs(*arguments), settings=SMALL)
    with torch.autocast(device, dtype=dtype):
        inside = gradient(grad_out, AtrmInputs(*arguments), settings=SMALL)
    assert all(torch.equal(grad, exact) for grad, exact in zip(inside, expected, strict=True))


def test_strided_and_expanded_inputs(device):
    _, arguments = make(20, 40, lengths=[19, 3, 0], device=device)
    tokens = arguments[0]
    ones = torch.ones((), device=device).expand(3, 5, 40)  # as the backward of a sum gives it
    rest = arguments[1:-1]
    expected = gradient(ones.clone(), AtrmInputs(tokens[:, 1:].clone(), *rest, tokens[:, 0].clone()), settings=SMALL)
    views = [p if p is None or p.dim() == 0 else torch.stack([p, p], dim=-1)[..., 0] for p in rest]
    actual = gradient(ones, AtrmInputs(tokens[:, 1:], *views, tokens[:, 0]), settings=SMALL)
    assert all(grad.is_contiguous() for grad in actual)
    assert max(errors(actual, expected).values()) <= 2e-5  # PyTorch may add up strided operands in another order
    expanded = tokens[:1, 1:].expand(3, -1, -1)
    actual = gradient(ones, AtrmInputs(expanded, *rest, tokens[:, 0]), settings=SMALL)
    expected = gradient(ones, AtrmInputs(expanded.clone(), *rest, tokens[:, 0]), settings=SMALL)
    assert all(torch.equal(grad, exact) for grad, exact in zip(actual, expected, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors anywhere")
def test_tensors_on_the_cpu_are_refused():
    grad_out, arguments = make(7, 16)
    with pytest.raises(KernelError, match=r"got cpu: use finelip_fast\.kernels\.atrm"):
        gradient(grad_out, AtrmInputs(*arguments))


# Compiled for GPUs that are not here -----------------------------------------------------------------------------------


@cache
def compile_both(capability, width, aggregated):
    """The two kernels as the default settings launch them, with lengths and a float16 gradient."""
    from ahead_of_time import compile_launches

    x, logits = (torch.empty(64, 256, size, device="meta") for size in (width, aggregated))
    grad_out = torch.empty(64, aggregated + 1, width, dtype=torch.float16, device="meta")
    lengths = torch.empty(64, dtype=torch.int64, device="meta")
    cut = kernels.default_settings(capability=capability, width=width, aggregated=aggregated)
    rows, tokens = compile_launches(
        capability, lambda: kernels._through_softmax(grad_out, x, logits, lengths, settings=cut)
    )
    return {"rows": rows, "tokens": tokens}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("case", [(80, 768, 51), (90, 512, 39), (90, 768, 51), (120, 768, 51)], ids=str)
@pytest.mark.parametrize("kernel", ["rows", "tokens"])
def test_the_kernels_fit_and_spill_nothing(case, kernel):
    from ahead_of_time import SHARED_MEMORY_LIMIT

    compiled = compile_both(*case)[kernel]
    assert compiled.shared_bytes <= SHARED_MEMORY_LIMIT[case[0]]
    assert compiled.spilled_bytes == 0
    assert not compiled.overwritten


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("kernel", ["rows", "tokens"])
def test_items_are_addressed_in_64_bits(kernel):
    ttir = compile_both(90, 512, 39)[kernel].ttir
    assert re.search(r"arith\.muli %item\S*, \S+ : i64", ttir)
    assert not re.search(r"arith\.muli %item\S*, \S+ : i32", ttir)
