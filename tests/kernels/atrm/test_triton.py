"""Token aggregation's kernels: equal to the formula however the work is cut, and compiled for GPUs that are not here.

Runs on a GPU, or on the CPU by Triton's interpreter: ``TRITON_INTERPRET=1 pytest tests/kernels -m triton``.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import astuple, replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from finelip_fast.errors import KernelError
from finelip_fast.kernels.atrm import triton as kernels
from finelip_fast.kernels.atrm.formula import AtrmInputs
from finelip_fast.kernels.atrm.triton import AtrmSettings, aggregate, aggregate_folded, fold

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned_memory")]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
SMALL = AtrmSettings(
    logits_tokens=16,
    logits_width=32,
    logits_warps=4,
    logits_stages=2,
    pool_rows=16,
    pool_tokens=16,
    pool_width=32,
    pool_warps=4,
    pool_stages=2,
)


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


def numbers(*tensors):
    return [tensor.detach().double().cpu().numpy() for tensor in tensors]


def expected_embeddings(method, x, parameters, anchor, lengths=None):
    x, anchor, *parameters = numbers(x, anchor, *parameters)
    lengths = [x.shape[1]] * len(x) if lengths is None else lengths
    rows = [method.atrm(item[:n], first, *parameters) for item, first, n in zip(x, anchor, lengths, strict=True)]
    return np.stack(rows) if rows else np.zeros((0, len(parameters[-2]) + 1, x.shape[2]))


def largest_error(actual, expected):
    return float(np.abs(numbers(actual)[0] - expected).max(initial=0.0))


@pytest.mark.parametrize(
    ("sizes", "lengths"),
    [
        ({"tokens": 1, "width": 8, "hidden": 1, "aggregated": 1}, None),
        ({"tokens": 33, "width": 96, "hidden": 19, "aggregated": 39}, [33, 0, 17]),
        ({"tokens": 20, "width": 40, "hidden": 33, "aggregated": 12}, [1, 20, 16]),
        ({"tokens": 16, "width": 67, "hidden": 50, "aggregated": 17}, None),
    ],
    ids=str,
)
def test_equals_the_method(method, device, sizes, lengths):
    x, parameters, anchor = make(**sizes, device=device)
    counts = None if lengths is None else torch.tensor(lengths, device=device)
    out = aggregate(AtrmInputs(x, *parameters, counts, anchor), settings=SMALL)
    expected = expected_embeddings(method, x, parameters, anchor, lengths)
    assert out.shape == expected.shape
    assert out.dtype == torch.float32
    assert largest_error(out, expected) <= 1e-5


@st.composite
def cases(draw):
    tokens = draw(st.integers(0, 20))
    lengths = draw(st.one_of(st.none(), st.lists(st.integers(0, tokens), max_size=3)))
    return {
        "tokens": tokens,
        "lengths": lengths,
        "batch": draw(st.integers(0, 2)) if lengths is None else len(lengths),
        "width": draw(st.integers(1, 70)),
        "hidden": draw(st.integers(1, 50)),
        "aggregated": draw(st.integers(1, 20)),
        "scale": draw(st.sampled_from([-1.5, 0.0, 4.0])),
        "seed": draw(st.integers(0, 2**16)),
    }


@given(case=cases())
@settings(max_examples=20, deadline=None)
def test_equals_the_method_at_any_size(method, device, case):
    lengths = case.pop("lengths")
    x, parameters, anchor = make(**case, device=device)
    counts = None if lengths is None else torch.tensor(lengths, dtype=torch.int64, device=device)
    out = aggregate(AtrmInputs(x, *parameters, counts, anchor), settings=SMALL)
    expected = expected_embeddings(method, x, parameters, anchor, lengths)
    assert out.shape == expected.shape
    assert largest_error(out, expected) <= 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"logits_tokens": 64, "logits_width": 16},
        {"logits_width": 128, "pool_width": 128},
        {"pool_rows": 32, "pool_tokens": 32},
    ],
    ids=str,
)
def test_how_the_work_is_cut_changes_nothing(device, change):
    x, parameters, anchor = make(37, 72, hidden=20, aggregated=21, device=device)
    lengths = torch.tensor([37, 30, 5], device=device)
    expected = aggregate(AtrmInputs(x, *parameters, lengths, anchor), settings=SMALL)
    cut = aggregate(AtrmInputs(x, *parameters, lengths, anchor), settings=replace(SMALL, **change))
    torch.testing.assert_close(cut, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_default_settings_run(method, device, dtype):
    x, parameters, anchor = make(70, 96, batch=1, hidden=19, aggregated=12, device=device)
    out = aggregate(AtrmInputs(x.to(dtype), *parameters, None, anchor.to(dtype)))
    error = largest_error(out, expected_embeddings(method, x, parameters, anchor))
    assert error <= (1e-5 if dtype == torch.float32 else 2e-3)


def test_parameters_folded_once_give_the_same(device):
    x, parameters, anchor = make(9, 40, device=device)
    inputs = AtrmInputs(x, *parameters, None, anchor)
    assert torch.equal(aggregate_folded(inputs, fold(inputs), settings=SMALL), aggregate(inputs, settings=SMALL))


def logits_of(x, parameters):
    """The formula's logits in the dtype of its arguments, ``[B, N, K]``."""
    norm_weight, norm_bias, w1, b1, w2, b2, scale = parameters
    normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    return F.linear(F.gelu(F.linear(normed, w1, b1)), w2, b2) * scale


@pytest.mark.parametrize("mean", [0.0, 30.0, -1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tokens_of_a_large_mean_lose_no_more_than_in_pytorch(device, dtype, mean):
    """A folded LayerNorm subtracts what it should not have added; the result itself would hide it, being near the mean."""
    x, parameters, anchor = make(20, 96, hidden=19, device=device)
    x = (x + mean).to(dtype)
    parameters = [parameter.to(dtype) for parameter in parameters]
    expected = logits_of(x.double(), [parameter.double() for parameter in parameters])
    plain = (logits_of(x, parameters) - expected).abs().max().item()
    if INTERPRETED and dtype == torch.bfloat16:  # which the interpreter cannot multiply
        x = x.float()
    inputs = AtrmInputs(x, *parameters, None, anchor)
    logits = kernels.token_logits(inputs, fold(inputs), SMALL)
    assert (logits - expected).abs().max().item() <= 2 * plain + 1e-6


def in_plain_pytorch(x, parameters, anchor):
    """The formula in the inputs' dtype, as one would write it without care."""
    pooled = logits_of(x, parameters).softmax(dim=1).transpose(1, 2) @ x
    return F.normalize(torch.cat([anchor[:, None], pooled], dim=1), dim=-1)


@HALF
@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (23, 65), (40, 128)])
def test_low_precision_is_at_most_twice_as_far_off_as_pytorch(method, device, dtype, tokens, width):
    x, parameters, anchor = make(tokens, width, device=device)
    x, anchor, *parameters = (t.to(dtype) for t in (x, anchor, *parameters))
    expected = expected_embeddings(method, x, parameters, anchor)
    out = aggregate(AtrmInputs(x, *parameters, None, anchor), settings=SMALL)
    assert out.dtype == dtype
    plain = largest_error(in_plain_pytorch(x, parameters, anchor), expected)
    assert largest_error(out, expected) <= 2 * plain + 1e-6


@HALF
def test_parameters_and_anchor_may_be_float32(method, device, dtype):
    x, parameters, anchor = make(23, 40, device=device)
    x = x.to(dtype)
    expected = expected_embeddings(method, x, parameters, anchor)
    out = aggregate(AtrmInputs(x, *parameters, None, anchor), settings=SMALL)
    assert out.dtype == dtype
    rounded = in_plain_pytorch(x, [parameter.to(dtype) for parameter in parameters], anchor.to(dtype))
    assert largest_error(out, expected) <= 2 * largest_error(rounded, expected) + 1e-6


@pytest.mark.parametrize("poison", [1e30, math.inf, math.nan])
def test_padding_is_never_looked_at(device, poison):
    x, parameters, anchor = make(21, 24, device=device)
    lengths = torch.tensor([21, 0, 18], device=device)
    padding = torch.arange(21, device=device) >= lengths[:, None]
    clean, poisoned = (
        aggregate(AtrmInputs(x.masked_fill(padding[..., None], value), *parameters, lengths, anchor), settings=SMALL)
        for value in (0.0, poison)
    )
    assert torch.equal(poisoned, clean)


def test_lengths_outside_the_tokens_read_nothing_else(device):
    x, parameters, anchor = make(7, 16, device=device)
    out_of_range, clamped = (torch.tensor(lengths, device=device) for lengths in ([900, -3, 4], [7, 0, 4]))
    out = aggregate(AtrmInputs(x, *parameters, out_of_range, anchor), settings=SMALL)
    assert torch.equal(out, aggregate(AtrmInputs(x, *parameters, clamped, anchor), settings=SMALL))


@pytest.mark.parametrize("lengths", [torch.int32, torch.int64], ids=str)
def test_lengths_of_every_integer_type_are_taken(device, lengths):
    x, parameters, anchor = make(7, 16, device=device)
    strided = torch.tensor([[7, 0], [3, 0], [1, 0]], dtype=lengths, device=device)[:, 0]
    out = aggregate(AtrmInputs(x, *parameters, strided, anchor), settings=SMALL)
    for item, length in enumerate((7, 3, 1)):
        item_slice = slice(item, item + 1)
        alone = aggregate(AtrmInputs(x[item_slice, :length], *parameters, None, anchor[item_slice]), settings=SMALL)
        torch.testing.assert_close(out[item_slice], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tokens", [0, 5])
def test_an_item_without_tokens_has_zero_rows_after_its_anchor(device, tokens):
    x, parameters, anchor = make(tokens, 40, device=device)
    lengths = torch.zeros(3, dtype=torch.int64, device=device)
    out = aggregate(AtrmInputs(x, *parameters, lengths, anchor), settings=SMALL)
    torch.testing.assert_close(out[:, 0], F.normalize(anchor, dim=-1))
    assert torch.equal(out[:, 1:], torch.zeros(3, 4, 40, device=device))


def test_without_aggregated_tokens_there_are_the_anchors(device, poisoned_memory):
    x, parameters, anchor = make(5, 40, aggregated=0, device=device)
    out = aggregate(AtrmInputs(x, *parameters, None, anchor), settings=SMALL)
    torch.testing.assert_close(out, F.normalize(anchor, dim=-1)[:, None])


def test_an_empty_batch(device):
    x, parameters, anchor = make(5, 16, batch=0, device=device)
    lengths = torch.zeros(0, dtype=torch.int64, device=device)
    assert aggregate(AtrmInputs(x, *parameters, lengths, anchor), settings=SMALL).shape == (0, 5, 16)


def test_zero_rows_stay_zero_and_others_get_unit_length(device):
    x, parameters, anchor = make(13, 40, device=device)
    x, anchor = x * torch.tensor([100.0, 0.0, 1e-6], device=device)[:, None, None], anchor.clone()
    anchor[2] = 0.0
    out = aggregate(AtrmInputs(x, *parameters, None, anchor), settings=SMALL)
    assert not out[1, 1:].any()
    assert not out[2, 0].any()
    norms = torch.cat([out[0], out[1, :1], out[2, 1:]]).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)


def test_the_softmax_survives_a_large_scale(device):
    x, parameters, anchor = make(33, 40, device=device, scale=1e4)
    out = aggregate(AtrmInputs(x, *parameters, None, anchor), settings=SMALL)
    # One token takes all the weight: every aggregated row is one of the item's own tokens.
    nearest = (out[:, 1:] @ F.normalize(x, dim=-1).transpose(1, 2)).amax(dim=-1)
    torch.testing.assert_close(nearest, torch.ones_like(nearest), rtol=0, atol=1e-5)


def test_nan_in_a_valid_token_stays_in_its_item(device):
    x, parameters, anchor = make(20, 40, device=device)
    clean = aggregate(AtrmInputs(x, *parameters, None, anchor), settings=SMALL)
    x[1, 17, 3] = math.nan
    out = aggregate(AtrmInputs(x, *parameters, None, anchor), settings=SMALL)
    assert out[1, 1:].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    assert torch.equal(out[1, 0], clean[1, 0])


def test_strided_and_expanded_inputs(device):
    tokens, parameters, _ = make(20, 40, device=device)
    x, anchor = tokens[:, 1:], tokens[:, 0]  # how the image encoder gives them
    expected = aggregate(AtrmInputs(x.clone(), *parameters, None, anchor.clone()), settings=SMALL)
    assert torch.equal(aggregate(AtrmInputs(x, *parameters, None, anchor), settings=SMALL), expected)

    by_token = x.transpose(0, 1).contiguous().transpose(0, 1)
    last_strided = torch.stack([anchor, anchor], dim=-1)[..., 1]
    views = [p if p.dim() == 0 else torch.stack([p, p], dim=-1)[..., 0] for p in parameters]
    assert torch.equal(aggregate(AtrmInputs(by_token, *views, None, last_strided), settings=SMALL), expected)
    by_column = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(aggregate(AtrmInputs(by_column, *parameters, None, anchor), settings=SMALL), expected)

    expanded, first = x[:1].expand(3, -1, -1), anchor[:1].expand(3, -1)
    assert torch.equal(aggregate(AtrmInputs(expanded, *parameters, None, first), settings=SMALL), expected[[0, 0, 0]])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
def test_scale_of_any_shape_of_one_element(device, shape):
    x, parameters, anchor = make(7, 16, device=device)
    expected = aggregate(AtrmInputs(x, *parameters, None, anchor), settings=SMALL)
    scale = parameters[-1].reshape(shape)
    assert torch.equal(aggregate(AtrmInputs(x, *parameters[:-1], scale, None, anchor), settings=SMALL), expected)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors anywhere")
def test_tensors_on_the_cpu_are_refused():
    x, parameters, anchor = make(7, 16)
    with pytest.raises(KernelError, match=r"got cpu: use finelip_fast\.kernels\.atrm"):
        aggregate(AtrmInputs(x, *parameters, None, anchor))


@given(hidden=st.integers(1, 600))
def test_hidden_units_are_held_by_one_or_two_powers_of_two(hidden):
    head, rest = kernels.split_hidden(hidden)
    assert head + rest >= hidden
    assert head + rest <= max(16, 2 * hidden)
    for size in (head, rest):
        assert size == 0 or (size >= 16 and size & (size - 1) == 0)


@given(
    capability=st.sampled_from([80, 86, 90, 100, 120]),
    width=st.integers(1, 2048),
    aggregated=st.integers(1, 128),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    items=st.integers(0, 2000),
)
def test_default_settings_are_powers_of_two(capability, width, aggregated, dtype, items):
    chosen = kernels.default_settings(
        capability=capability, width=width, aggregated=aggregated, dtype=dtype, items=items
    )
    assert all(value > 0 and value & (value - 1) == 0 for value in astuple(replace(chosen, logits_stages=1)))


# Compiled for GPUs that are not here -----------------------------------------------------------------------------------


@cache
def compile_both(capability, dtype, width, aggregated):
    """The two kernels as the default settings launch them, with lengths, for contiguous tokens."""
    from ahead_of_time import compile_launches

    hidden = width // 5
    shapes = ((width,), (width,), (hidden, width), (hidden,), (aggregated, hidden), (aggregated,), ())
    x, anchor, *parameters = (
        torch.empty(shape, dtype=dtype, device="meta") for shape in ((64, 256, width), (64, width), *shapes)
    )
    lengths = torch.empty(64, dtype=torch.int64, device="meta")
    cut = kernels.default_settings(capability=capability, width=width, aggregated=aggregated, dtype=dtype)
    logits, pool = compile_launches(
        capability, lambda: aggregate(AtrmInputs(x, *parameters, lengths=lengths, anchor=anchor), settings=cut)
    )
    return {"logits": logits, "pool": pool}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_without_care_hopper_overwrites_what_it_multiplies(monkeypatch):
    """What an H200 showed, and that it is seen in the compiled code; should Triton mend it, the care may go."""
    monkeypatch.setattr(kernels, "has_own_products", lambda _: False)
    monkeypatch.setattr(kernels, "_MOST_ROWS", 64)
    settings = kernels.default_settings
    monkeypatch.setattr(kernels, "default_settings", lambda **sizes: replace(settings(**sizes), pool_rows=64))
    careless = compile_both.__wrapped__(90, torch.float16, 512, 39)
    assert "2 buffers, 2 filled ahead" in " ".join(careless["logits"].overwritten)
    assert "several products in flight" in " ".join(careless["pool"].overwritten)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("case", [(torch.float16, 512, 39), (torch.bfloat16, 768, 51)], ids=str)
@pytest.mark.parametrize("kernel", ["logits", "pool"])
def test_the_kernels_fit_and_spill_nothing(capability, case, kernel):
    from ahead_of_time import SHARED_MEMORY_LIMIT

    compiled = compile_both(capability, *case)[kernel]
    assert compiled.shared_bytes <= SHARED_MEMORY_LIMIT[capability]
    assert compiled.spilled_bytes == 0
    assert not compiled.overwritten
    assert compiled.uses_wgmma is (kernel == "logits" and capability == 90)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("kernel", "names"), [("logits", ("x", "logits")), ("pool", ("x", "logits", "out"))])
def test_tokens_are_addressed_in_64_bits(kernel, names):
    """A batch of 4 GB is past 32 bits; the item is widened before it is multiplied."""
    ttir = compile_both(90, torch.float16, 512, 39)[kernel].ttir
    for name in names:
        moves = re.findall(rf"tt\.addptr %{name}, \S+ : \S+, (\S+)", ttir)
        moves += [
            width
            for base in re.findall(rf"(%\S+) = tt\.splat %{name} :", ttir)
            for width in re.findall(rf"tt\.addptr {re.escape(base)}, \S+ : \S+, (\S+)", ttir)
        ]
        assert moves, name
        assert all("i64" in width for width in moves), name
    assert re.search(r"arith\.muli %item\S*, \S+ : i64", ttir)
