"""Arguments that would be dropped, truncated or read from another device's memory are refused by name."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from finelip_fast.errors import InputError
from finelip_fast.kernels import (
    atrm,
    clim_scores,
    clim_topk,
    clim_topk_int8,
    cosine_candidates,
    quantize,
    quantize_items,
)

QUERIES, ITEMS = (F.normalize(torch.randn(*shape), dim=-1) for shape in ((3, 4, 8), (5, 6, 8)))
VALUES, SCALES = quantize(ITEMS)
QUANTIZED = quantize_items(ITEMS)
NO_FLOATS = [torch.complex64, torch.int64, torch.uint8, torch.bool]


def aggregate(**changed):
    arguments = {"x": torch.randn(3, 7, 8), "norm_weight": torch.randn(8), "norm_bias": torch.randn(8)}
    arguments |= {"w1": torch.randn(5, 8), "b1": torch.randn(5), "w2": torch.randn(4, 5), "b2": torch.randn(4)}
    arguments |= {"scale": torch.ones(1), "anchor": torch.randn(3, 8)}
    return atrm(**arguments | {name: change(arguments.get(name)) for name, change in changed.items()})


SEARCHES = {
    "clim_scores": lambda queries=QUERIES, items=ITEMS, **options: clim_scores(queries, items, **options),
    "clim_topk": lambda queries=QUERIES, items=ITEMS, k=2, **options: clim_topk(queries, items, k, **options),
    "clim_topk_int8": lambda queries=QUERIES, items=ITEMS, k=2, **options: clim_topk_int8(
        queries, items, QUANTIZED, k, **options
    ),
    "cosine_candidates": lambda queries=QUERIES, k=2, **options: cosine_candidates(
        queries[:, 0], VALUES[:, 0], SCALES[:, 0], k, **options
    ),
}


@pytest.mark.parametrize(
    "alpha", [float("nan"), float("inf"), 2, -0.1, True, "x", None, 1j, [0.5], torch.tensor(0.5, requires_grad=True)]
)
@pytest.mark.parametrize("name", ["clim_scores", "clim_topk", "clim_topk_int8"])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_alpha_is_a_number_from_0_to_1(name, alpha, with_gradient):
    with pytest.raises(InputError, match=r"expected alpha (in \[0, 1\], got|as a number, got a tensor)"):
        SEARCHES[name](queries=QUERIES.clone().requires_grad_(with_gradient), alpha=alpha)


@pytest.mark.parametrize("alpha", [0, 1, np.float32(0.5), np.float64(0.5)], ids=repr)
def test_numbers_of_other_kinds_are_weights_too(alpha):
    assert torch.equal(clim_scores(QUERIES, ITEMS, alpha=alpha), clim_scores(QUERIES, ITEMS, alpha=float(alpha)))


def test_a_weight_that_learns_is_two_scores():
    """The error for a tensor as alpha advises this."""
    alpha = torch.tensor(0.3, requires_grad=True)
    scores = alpha * clim_scores(QUERIES, ITEMS, alpha=1.0) + (1 - alpha) * clim_scores(QUERIES, ITEMS, alpha=0.0)
    torch.testing.assert_close(scores, clim_scores(QUERIES, ITEMS, alpha=0.3), rtol=0, atol=1e-6)
    scores.sum().backward()
    assert alpha.grad is not None


@pytest.mark.parametrize("k", [0, -1, True, False, 2.0, "2", None, np.float64(2)], ids=repr)
@pytest.mark.parametrize("name", ["clim_topk", "clim_topk_int8", "cosine_candidates"])
def test_how_many_is_a_number_from_1(name, k):
    with pytest.raises(
        InputError, match=f"expected (k|count) (to be an integer|of at least 1), got {re.escape(repr(k))}"
    ):
        SEARCHES[name](k=k)


def test_more_than_there_are_is_all():
    assert clim_topk(QUERIES, ITEMS, 10**30)[1].shape == (3, 5)


@pytest.mark.parametrize("dtype", NO_FLOATS, ids=str)
@pytest.mark.parametrize("name", SEARCHES)
def test_rows_are_floats(name, dtype):
    with pytest.raises(InputError, match=f"expected queries in a float dtype, got {dtype}: convert it"):
        SEARCHES[name](queries=QUERIES.to(dtype))
    if name != "cosine_candidates":
        with pytest.raises(InputError, match=f"expected items in a float dtype, got {dtype}: convert"):
            SEARCHES[name](items=ITEMS.to(dtype))


@pytest.mark.parametrize("dtype", [*NO_FLOATS, torch.int8], ids=str)
def test_what_is_quantised_is_floats(dtype):
    for function in (quantize, quantize_items):
        with pytest.raises(InputError, match=f"in a float dtype, got {dtype}"):
            function(ITEMS.to(dtype))


@pytest.mark.parametrize("rows", [QUERIES.tolist(), QUERIES.numpy(), None, "abc", QUERIES.to_sparse()], ids=type)
def test_rows_are_dense_tensors(rows):
    for search in (clim_scores, lambda queries, items: clim_topk(queries, items, 2)):
        with pytest.raises(
            InputError, match=r"expected queries as a dense torch.Tensor, got (list|ndarray|None|str|torch)"
        ):
            search(rows, ITEMS)
    with pytest.raises(InputError, match=r"expected items as a dense torch\.Tensor"):
        clim_scores(QUERIES, rows)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (ITEMS.tolist(), "expected items as tensors or numpy arrays, or a sequence of them, got list"),
        (None, "or a sequence of them, got NoneType"),
        ("abc", "or a sequence of them, got str"),
        (np.full((5, 6, 8), "a"), "expected items in a dtype of PyTorch, got <U1: convert them"),
        (ITEMS.numpy().astype(">f4"), "expected items in a dtype of PyTorch, got >f4: convert them"),
        (np.full((5, 6, 8), None), "expected items in a dtype of PyTorch, got object: convert them"),
    ],
    ids=["lists", "None", "str", "text", "big-endian", "objects"],
)
def test_searched_items_are_arrays(items, message):
    with pytest.raises(InputError, match=message):
        clim_topk(QUERIES, items, 2)


@pytest.mark.parametrize("among", [[1, 2], np.array([1, 2]), 3, "1"], ids=repr)
def test_a_choice_of_items_is_a_tensor(among):
    for name in ("clim_topk", "clim_topk_int8", "cosine_candidates"):
        with pytest.raises(
            InputError, match=f"expected among as int64 .*, got {type(among).__name__}: make it a tensor"
        ):
            SEARCHES[name](among=among)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_tensors_are_on_one_device(with_gradient):
    queries = QUERIES.clone().requires_grad_(with_gradient)
    with pytest.raises(InputError, match="expected all tensors on one device, got items on meta and others on cpu"):
        clim_scores(queries, ITEMS.to("meta"))
    for name in ("norm_weight", "norm_bias", "w1", "b1", "w2", "b2", "scale", "anchor"):
        with pytest.raises(InputError, match=f"expected all tensors on one device, got {name} on meta"):
            aggregate(**{name: lambda tensor: tensor.to("meta")})
    with pytest.raises(InputError, match="got lengths on meta"):
        aggregate(lengths=lambda _: torch.tensor([1, 2, 3], device="meta"))


@pytest.mark.parametrize(
    ("query_scales", "message"),
    [
        (lambda scales: scales.double(), "expected scales in float32 for queries, got torch.float64"),
        (lambda scales: scales.half(), "expected scales in float32 for queries, got torch.float16"),
        (lambda scales: scales.to(torch.complex64), "expected scales in float32 for queries, got torch.complex64"),
        (lambda scales: scales.tolist(), "expected scales of queries as a dense torch.Tensor, got list"),
        (lambda scales: scales.to("meta"), "expected all tensors on one device, got scales of queries on meta"),
    ],
)
def test_scales_are_float32(query_scales, message):
    values, scales = quantize(QUERIES)
    with pytest.raises(InputError, match=message):
        clim_scores(values, VALUES, query_scales=query_scales(scales), item_scales=SCALES)


@pytest.mark.parametrize(
    ("field", "dtype"),
    [("values", torch.int16), ("scales", torch.float64), ("terms", torch.int64), ("anchors", torch.int8)],
)
def test_quantized_items_are_as_they_are_made(field, dtype):
    quantized = QUANTIZED._replace(**{field: getattr(QUANTIZED, field).to(dtype)})
    with pytest.raises(InputError, match="expected quantized items in int8, float32, float32 and floats, got"):
        clim_topk_int8(QUERIES, ITEMS, quantized, 2)
    with pytest.raises(InputError, match="expected quantized as QuantizedItems, got tuple; see quantize_items"):
        clim_topk_int8(QUERIES, ITEMS, tuple(QUANTIZED), 2)


def test_items_to_quantise_have_three_axes():
    with pytest.raises(InputError, match=r"expected items \[N, L, D\], got \[6, 8\]"):
        quantize_items(ITEMS[0])


@pytest.mark.parametrize("dtype", NO_FLOATS, ids=str)
@pytest.mark.parametrize("name", ["x", "norm_weight", "norm_bias", "w1", "b1", "w2", "b2", "scale", "anchor"])
def test_what_is_aggregated_is_floats(name, dtype):
    with pytest.raises(InputError, match=f"expected {name} in a float dtype, got {dtype}: convert it"):
        aggregate(**{name: lambda tensor: tensor.to(dtype)})
    with pytest.raises(InputError, match=f"expected {name} as a dense torch.Tensor, got list"):
        aggregate(**{name: lambda tensor: tensor.tolist() if tensor.ndim else [1.0]})


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([7.5, 1.0, 2.0]), "expected lengths in an integer dtype, got torch.float32: convert it"),
        (torch.tensor([True, False, True]), "expected lengths in an integer dtype, got torch.bool"),
        (torch.tensor([1j, 1, 2]), "expected lengths in an integer dtype, got torch.complex64"),
        ([7, 3, 0], "expected lengths as a dense torch.Tensor, got list"),
    ],
    ids=["float", "bool", "complex", "list"],
)
def test_lengths_are_whole_numbers(lengths, message):
    with pytest.raises(InputError, match=message):
        aggregate(lengths=lambda _: lengths)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8], ids=str)
def test_lengths_out_of_range_count_as_the_nearest(dtype):
    torch.manual_seed(0)
    beyond = aggregate(lengths=lambda _: torch.tensor([100, -100, 3], dtype=dtype))
    torch.manual_seed(0)
    within = aggregate(lengths=lambda _: torch.tensor([7, 0, 3]))
    torch.testing.assert_close(beyond, within, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"w1": torch.tensor(1.0)}, r"expected w1 of shape \[1, 8\] for x \[3, 7, 8\], got \[\]"),
        ({"w2": torch.tensor(1.0)}, r"expected w2 of shape \[1, 5\] for x \[3, 7, 8\], got \[\]"),
        ({"w1": torch.ones(0, 8)}, r"expected D and h of at least 1, got x \[3, 7, 8\] and w1 \[0, 8\]"),
        ({"x": torch.ones(3, 7, 0), "anchor": torch.ones(3, 0)}, r"expected D and h of at least 1, got x \[3, 7, 0\]"),
    ],
    ids=["w1 []", "w2 []", "no hidden", "no width"],
)
def test_shapes_without_numbers_are_refused(changed, message):
    with pytest.raises(InputError, match=message):
        aggregate(**{name: lambda _, value=value: value for name, value in changed.items()})
