"""The best items: exactly float64's, in whatever chunks, from wherever the items are, with either pass."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finelip_fast.errors import InputError
from finelip_fast.kernels import clim_topk, clim_topk_int8, quantize
from finelip_fast.kernels.clim import rows as _rows
from finelip_fast.kernels.clim import search as _search
from finelip_fast.kernels.clim import topk as _topk
from finelip_fast.kernels.clim.cpu import scores
from finelip_fast.kernels.clim.quantize import QuantizedItems, error_terms, quantize_items
from finelip_fast.kernels.clim.rows import Pieces
from finelip_fast.kernels.clim.topk import exact_topk_int8, topk
from finelip_fast.kernels.dispatch import Choice

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["as shipped", "small", "smallest", "joined as on a GPU"])
def chunks(request, monkeypatch):
    """Sizes of the chunks: as shipped, with edges between few items, one item at a time, and a few of them joined."""
    sizes = {"small": (30, 4000, 900, 2000), "smallest": (1, 1, 0, 1)}.get(request.param, ())
    names = ["_SCORE_ELEMENTS", "_COPY_BYTES", "_TINY_BYTES", "_RESCORE_ELEMENTS"]
    for name, value in zip(names, sizes, strict=False):
        monkeypatch.setattr(_topk if name == "_RESCORE_ELEMENTS" else _rows, name, value)
    if request.param == "joined as on a GPU":
        as_on_a_gpu(monkeypatch)
        monkeypatch.setattr(_topk, "_GPU_SCORE_ELEMENTS", 40)


def as_on_a_gpu(patch):
    for module in (_topk, _rows):
        patch.setattr(module, "is_gpu", lambda device: True)


def make(*shape, seed=0, dtype=torch.float32):
    """Random embeddings: unit rows ``[..., D]``."""
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1).to(dtype)


def search_int8(queries, items, k, *, alpha, score=scores, quantized=None, among=None):
    quantized = quantize_items(items) if quantized is None else quantized
    return exact_topk_int8(queries, Pieces(items), quantized, k, alpha=alpha, score=score, among=among)[:2]


def search_full(queries, items, k, *, alpha, score=scores, among=None):
    return topk(queries, Pieces(items), k, alpha=alpha, score=score, among=among)


def rounded_scores(queries, items, *, alpha):
    """Scores of products that are rounded to bfloat16, but for the global cosine."""
    products = queries.flatten(0, 1).float() @ items.flatten(0, 1).float().T
    products = products.view(*queries.shape[:2], *items.shape[:2])  # [Q, L_q, n, L_i]
    if products.shape[1] == 0 or products.shape[3] == 0:
        return products.new_zeros(len(queries), len(items))
    rounded = products.bfloat16().float()
    fine = sum(F.leaky_relu(rounded.amax(axis), 0.1).mean(1 if axis == 3 else 2) for axis in (1, 3))
    return alpha * products[:, 0, :, 0] + (1 - alpha) * fine


def search_rounded(queries, items, k, *, alpha, score=scores, among=None):
    rounding = {"coarse": rounded_scores, "product_error": 1.01 * 2**-8}
    return topk(queries, Pieces(items), k, alpha=alpha, score=score, among=among, **rounding)


SEARCHES = {"full": search_full, "rounded": search_rounded, "int8": search_int8}


@pytest.fixture(params=SEARCHES)
def search(request):
    return SEARCHES[request.param]


def expected_topk(method, queries, items, k, alpha):
    """The float32 nearest to float64's scores, best first, ties by lower index, NaN last."""
    exact = method.score_matrix(queries.double().numpy(), items.double().numpy(), alpha).astype(np.float32)
    order = np.argsort(-np.nan_to_num(exact, nan=-np.inf), axis=1, kind="stable")[:, :k]
    return torch.from_numpy(np.take_along_axis(exact, order, axis=1)), torch.from_numpy(order)


def assert_same(actual, expected):
    assert (actual[0].dtype, actual[1].dtype) == (torch.float32, torch.int64)
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-7, equal_nan=True)


@given(
    n_queries=st.integers(0, 4),
    n_items=st.integers(0, 40),
    tokens=st.tuples(st.integers(0, 4), st.integers(0, 5)),
    k=st.integers(1, 50),
    alpha=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_float64(method, chunks, n_queries, n_items, tokens, k, alpha, dtype, seed):
    queries = make(n_queries, tokens[0], 24, seed=seed, dtype=dtype)
    items = make(n_items, tokens[1], 24, seed=seed + 1, dtype=dtype)
    expected = expected_topk(method, queries, items, k, alpha)
    for search in SEARCHES.values():
        actual = search(queries, items, k, alpha=alpha)
        assert actual[1].shape == (n_queries, min(k, n_items))
        assert_same(actual, expected)


def axes(items, width=8):
    """Embeddings of one row along an axis, scaled: their products, and so their ties, are exact."""
    rows = torch.zeros(len(items), 1, width)
    for row, (axis, length) in zip(rows, items, strict=True):
        row[0, axis] = length
    return rows


exact_rows = st.tuples(st.integers(0, 2), st.sampled_from([-1.0, -0.5, 0.25, 0.5, 1.0]))


@given(
    queries=st.lists(exact_rows, max_size=3),
    items=st.lists(exact_rows, max_size=40),
    k=st.integers(1, 50),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ties_go_to_the_lower_index(method, chunks, queries, items, k, alpha):
    queries, items = axes(queries), axes(items)
    expected = expected_topk(method, queries, items, k, alpha)
    for search in SEARCHES.values():
        assert_same(search(queries, items, k, alpha=alpha), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("copies", [2, 13])
def test_copies_of_an_item_tie_wherever_they_stand(chunks, search, dtype, copies):
    queries, items = make(3, 5, 40, dtype=dtype), make(7, 6, 40, seed=1, dtype=dtype)
    best, order = search(queries, items, 7, alpha=0.8)
    values, indices = search(queries, items.repeat(copies, 1, 1), 5 * copies, alpha=0.8)
    expected = order[:, :5, None] + 7 * torch.arange(copies)
    assert torch.equal(indices, expected.flatten(1))
    assert torch.equal(values, best[:, :5].repeat_interleave(copies, dim=1))


def test_items_that_are_all_alike(chunks, search):
    queries, items = make(2, 3, 16), make(1, 4, 16, seed=1).expand(30, -1, -1)
    values, indices = search(queries, items, 5, alpha=0.8)
    assert indices.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert (values == values[:, :1]).all()


def test_near_ties_come_in_float64s_order(method, chunks, search):
    # Scores some 1e-7 apart: float32 products confuse them, and int8 cannot tell them apart at all.
    generator = torch.Generator().manual_seed(0)
    queries = make(3, 5, 64)
    items = make(1, 6, 64, seed=1) + 3e-7 * torch.randn(50, 6, 64, generator=generator)
    expected = expected_topk(method, queries, items, 20, 0.8)
    assert (expected[0][:, 0] - expected[0][:, -1]).max() < 1e-5
    assert_same(search(queries, items, 20, alpha=0.8), expected)


def test_the_rounding_of_the_pass_does_not_matter(search):
    queries, items = make(4, 5, 64), make(60, 6, 64, seed=1)
    items[20:40] = items[:20]
    generator = torch.Generator().manual_seed(2)

    def noisy(*args, **kwargs):
        exact = scores(*args, **kwargs)
        return exact + (torch.rand(exact.shape, generator=generator) - 0.5) * 2e-6

    quiet = search(queries, items, 25, alpha=0.8)
    for tensor, quiet_tensor in zip(search(queries, items, 25, alpha=0.8, score=noisy), quiet, strict=True):
        assert torch.equal(tensor, quiet_tensor)


@pytest.mark.parametrize("token", [0, 3], ids=["global", "other"])
def test_nan_comes_last(chunks, search, token):
    queries, items = make(2, 4, 16), make(9, 5, 16, seed=1)
    finite = [0, 2, 3, 4, 5, 7, 8]
    best, order = search(queries, items[finite], 7, alpha=0.8)
    items[[1, 6], token, 2] = math.nan
    values, indices = search(queries, items, 9, alpha=0.8)
    assert torch.equal(indices[:, :7], torch.tensor(finite)[order])
    assert torch.equal(values[:, :7], best)
    assert indices[:, 7:].tolist() == [[1, 6], [1, 6]]
    assert values[:, 7:].isnan().all()
    assert torch.equal(search(queries, items, 4, alpha=0.8)[1], indices[:, :4])


def test_a_query_that_is_nan_keeps_the_order_of_the_items(chunks, search):
    queries, items = make(2, 4, 16), make(9, 5, 16, seed=1)
    queries[1, 2, 0] = math.nan
    values, indices = search(queries, items, 4, alpha=0.8)
    assert values[0].isfinite().all()
    assert values[1].isnan().all()
    assert indices[1].tolist() == [0, 1, 2, 3]


def test_zero_rows(chunks, search):
    queries, items = torch.zeros(2, 3, 16), make(9, 5, 16, seed=1)
    values, indices = search(queries, items, 4, alpha=0.8)
    assert not values.any()
    assert indices.tolist() == [[0, 1, 2, 3]] * 2


def test_strided_items(search):
    queries, items = make(2, 3, 16), make(20, 10, 16, seed=1)
    expected = search(queries, items[::2, 1::3].clone(), 4, alpha=0.8)
    for tensor, expected_tensor in zip(search(queries, items[::2, 1::3], 4, alpha=0.8), expected, strict=True):
        assert torch.equal(tensor, expected_tensor)


def test_needs_no_gradient(search):
    queries, items = make(2, 4, 16).requires_grad_(), make(9, 5, 16, seed=1)
    assert not search(queries, items, 3, alpha=0.8)[0].requires_grad


# Where the items are -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["numpy", "torch"])
def mapped(request, tmp_path_factory):
    """float16 items in memory, and the same mapped from a file, which must not be written to."""
    items = make(40, 5, 24, seed=1, dtype=torch.float16)
    path = tmp_path_factory.mktemp("mapped") / "items"
    items.numpy().tofile(path)
    if request.param == "numpy":
        return items, np.memmap(path, dtype=np.float16, mode="r", shape=(40, 5, 24))
    return items, torch.from_file(str(path), size=items.numel(), dtype=torch.float16).view(40, 5, 24)


def test_items_mapped_from_a_file(chunks, mapped):
    in_memory, from_file = mapped
    queries, quantized = make(3, 4, 24), quantize_items(in_memory)
    expected = search_full(queries, in_memory, 6, alpha=0.8)
    for tensor, expected_tensor in zip(search_full(queries, from_file, 6, alpha=0.8), expected, strict=True):
        assert torch.equal(tensor, expected_tensor)
    for tensor, expected_tensor in zip(
        search_int8(queries, from_file, 6, alpha=0.8, quantized=quantized), expected, strict=True
    ):
        assert torch.equal(tensor, expected_tensor)


def test_quantized_items_mapped_from_a_file(chunks, tmp_path):
    queries, items = make(3, 4, 24), make(40, 5, 24, seed=1)
    quantized = quantize_items(items)
    fields = []
    for name, field in zip(QuantizedItems._fields, quantized, strict=True):
        np.save(tmp_path / f"{name}.npy", field.numpy())
        fields.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    expected = search_int8(queries, items, 6, alpha=0.8, quantized=quantized)
    for tensor, expected_tensor in zip(
        search_int8(queries, items, 6, alpha=0.8, quantized=QuantizedItems(*fields)), expected, strict=True
    ):
        assert torch.equal(tensor, expected_tensor)


def cut(rows, at):
    """Pieces that end at these items, some of them NumPy's, of which nothing may be written to."""
    pieces = list(rows.tensor_split(at))
    for number in range(0, len(pieces), 2):
        if rows.dtype != torch.bfloat16:
            pieces[number] = pieces[number].numpy()
            pieces[number].flags.writeable = False
    return pieces


def ascending(n_items):
    return st.sets(st.integers(0, n_items - 1)).map(sorted) if n_items else st.just([])


@given(
    data=st.data(),
    n_items=st.integers(0, 40),
    k=st.integers(1, 50),
    alpha=st.sampled_from([0.0, 0.8]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pieces_and_a_choice_of_items(chunks, data, n_items, k, alpha, dtype, seed):
    queries = make(2, 3, 24, seed=seed, dtype=dtype)
    items = make(n_items, 4, 24, seed=seed + 1, dtype=dtype)
    items[1::3] = items[: len(items[1::3])]  # ties
    cuts = st.lists(st.integers(0, n_items), max_size=8).map(sorted)
    pieces = cut(items, data.draw(cuts))
    quantized = QuantizedItems(*(cut(field, data.draw(cuts)) for field in quantize_items(items)))
    chosen = torch.tensor(data.draw(ascending(n_items)), dtype=torch.int64)
    best, order = search_full(queries, items, k, alpha=alpha)
    best_chosen, order_chosen = search_full(queries, items[chosen], k, alpha=alpha)
    assert order_chosen.shape == (2, min(k, len(chosen)))
    for among, expected in [(None, (best, order)), (chosen, (best_chosen, chosen[order_chosen]))]:
        for search, options in [(search_full, {}), (search_rounded, {}), (search_int8, {"quantized": quantized})]:
            for tensor, expected_tensor in zip(
                search(queries, pieces, k, alpha=alpha, among=among, **options), expected, strict=True
            ):
                assert torch.equal(tensor, expected_tensor)


def test_no_item_that_is_not_chosen_is_read():
    queries, items = make(2, 4, 24), make(40, 5, 24, seed=1)
    chosen = torch.tensor([3, 4, 5, 20, 39])
    expected = search_full(queries, items[chosen], 3, alpha=0.8)
    spoilt = torch.full_like(items, math.nan)
    spoilt[chosen] = items[chosen]
    quantized = QuantizedItems(*(field.clone() for field in quantize_items(spoilt)))
    for name, search in SEARCHES.items():
        options = {"quantized": quantized} if name == "int8" else {}
        best, indices = search(queries, spoilt, 3, alpha=0.8, among=chosen, **options)
        assert torch.equal(best, expected[0])
        assert torch.equal(indices, chosen[expected[1]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sizes", [(1 << 22, 1 << 26), (60, 1000)], ids=["one chunk", "many chunks"])
def test_items_in_host_memory_are_searched_on_the_gpu(monkeypatch, sizes):
    monkeypatch.setattr(_rows, "_SCORE_ELEMENTS", sizes[0])
    monkeypatch.setattr(_rows, "_COPY_BYTES", sizes[1])

    def on_the_gpu(queries, items, *, alpha, query_scales=None, item_scales=None):
        assert queries.is_cuda
        assert items.is_cuda
        scales = [None if t is None else t.cpu() for t in (query_scales, item_scales)]
        cpu_scores = scores(queries.cpu(), items.cpu(), alpha=alpha, query_scales=scales[0], item_scales=scales[1])
        return cpu_scores.to(queries.device)

    queries, items = make(3, 4, 24), make(101, 5, 24, seed=1, dtype=torch.float16)
    expected = search_full(queries, items, 6, alpha=0.8)
    chosen = torch.tensor([0, 1, 2, 17, 30, 31, 55, 56, 57, 99, 100])
    best, order = search_full(queries, items[chosen], 6, alpha=0.8)

    def check(search, source, **options):
        for among, expected_result in [
            (None, expected),
            (chosen, (best, chosen[order])),
            (chosen.cuda(), (best, chosen[order])),
        ]:
            actual = search(queries.cuda(), source, 6, alpha=0.8, score=on_the_gpu, among=among, **options)
            assert all(
                torch.equal(tensor.cpu(), expected_tensor)
                for tensor, expected_tensor in zip(actual, expected_result, strict=True)
            )

    for source in (items, items.pin_memory(), items.cuda()):
        check(search_full, source)
        check(search_full, source.tensor_split([0, 1, 20, 21, 60]))
    check(search_full, items.numpy())
    for places in (["cpu"] * 4, ["cuda"] * 4, ["cpu", "cuda", "cpu", "cuda"]):
        fields = [field.to(place) for field, place in zip(quantize_items(items), places, strict=True)]
        check(search_int8, items, quantized=QuantizedItems(*fields))
        pieces = [field.tensor_split([10 * number, 50, 51]) for number, field in enumerate(fields)]
        check(search_int8, items.tensor_split(4), quantized=QuantizedItems(*pieces))


# How much is scored again --------------------------------------------------------------------------------------------


def test_a_gpu_scores_the_usual_candidates_again_in_one_go():
    at_once = [_topk.pairs_at_once((40, 512), (40, 512), torch.device(device)) for device in ("cuda", "cpu")]
    assert at_once[0] >= 1_000
    assert at_once[1] <= 50


class OnGpu(torch.Tensor):
    """Rows and what is made of them; counts what a GPU would launch, and what the host would wait for."""

    WAITS = ("__bool__", "__int__", "__float__", "item", "tolist", "cpu", "nonzero", "unique", "masked_select", "equal")
    launches = waits = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        place = args[1] if function.__name__ in ("__getitem__", "__setitem__") else ()
        by_mask = any(
            isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in (place, *torch_tuple(place))
        )
        result = super().__torch_function__(function, types, args, kwargs or {})
        OnGpu.waits += by_mask or function.__name__ in cls.WAITS
        OnGpu.launches += isinstance(result, torch.Tensor) and not (args and is_view(result, args[0]))
        return result


def is_view(result, tensor):
    with torch._C.DisableTorchFunctionSubclass():
        return (
            isinstance(tensor, torch.Tensor)
            and result.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        )


def torch_tuple(place):
    return place if isinstance(place, tuple) else ()


def scores_in_one_launch(queries, items, **options):
    with torch._C.DisableTorchFunctionSubclass():
        plain = {
            name: value.as_subclass(torch.Tensor) if name.endswith("scales") else value
            for name, value in options.items()
        }
        result = scores(queries.as_subclass(torch.Tensor), items.as_subclass(torch.Tensor), **plain)
    OnGpu.launches += 1
    return result.as_subclass(OnGpu)


@pytest.mark.parametrize("search", [search_full, search_int8])
def test_on_a_gpu_neither_pieces_nor_gaps_say_how_often_it_is_waited_for(monkeypatch, search):
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(_rows, "_TINY_BYTES", 0)
    queries, items = make(2, 3, 16).as_subclass(OnGpu), make(600, 3, 16, seed=1)
    fields = quantize_items(items)

    def counts(n_pieces, among):
        """Waits, and launches."""
        cut = lambda rows: [piece.as_subclass(OnGpu) for piece in rows.tensor_split(n_pieces)]  # noqa: E731
        options = {"quantized": QuantizedItems(*map(cut, fields))} if search is search_int8 else {}
        OnGpu.waits = OnGpu.launches = 0
        search(queries, cut(items), 5, alpha=0.8, score=scores_in_one_launch, among=among, **options)
        return OnGpu.waits, OnGpu.launches

    alive = torch.arange(600)[torch.arange(600) % 3 != 1]
    waits, launches = counts(1, None)
    waits_of_gaps, launches_of_gaps = counts(1, alive)
    assert waits_of_gaps <= waits + 4
    assert launches_of_gaps <= launches + 20
    for n_pieces in (2, 60):
        for among in (None, alive):
            assert counts(n_pieces, among)[0] <= waits + 10
    per_piece = (counts(60, alive)[1] - counts(30, alive)[1]) / 30
    assert per_piece <= (8 if search is search_int8 else 3)  # its reading and its scores


@pytest.mark.parametrize("search", [search_full, search_int8])
def test_items_are_not_copied_one_by_one_where_few_are_left_out(monkeypatch, search):
    monkeypatch.setattr(Pieces, "copy", lambda *_: pytest.fail("copied"))
    queries, items = make(2, 3, 16), make(600, 3, 16, seed=1)
    alive = torch.arange(600)[torch.arange(600) % 7 != 1]
    best, indices = search(queries, items, 5, alpha=0.8, among=alive)
    expected, order = search(queries, items[alive], 5, alpha=0.8)
    assert torch.equal(best, expected)
    assert torch.equal(indices, alive[order])


def test_few_items_are_scored_again(chunks):
    queries, items = make(3, 8, 128), make(200, 8, 128, seed=1)
    for row, query in enumerate(queries):  # ten items near each query
        near = slice(10 * row, 10 * row + 10)
        items[near] = F.normalize(query + 0.05 * items[near], dim=-1)
    values, indices, rescored = exact_topk_int8(
        queries, Pieces(items), quantize_items(items), 10, alpha=0.8, score=scores
    )
    assert indices.sort(dim=1).values.tolist() == [list(range(10 * row, 10 * row + 10)) for row in range(3)]
    assert (rescored.dtype, rescored.tolist()) == (torch.int64, [10, 10, 10])
    assert torch.equal(values, search_full(queries, items, 10, alpha=0.8)[0])


def test_what_a_coarse_pass_leaves_open_is_told_apart_in_float32():
    # Without the global cosine, random items differ by less than what int8 and bfloat16 lose.
    queries, items = make(3, 8, 128), make(400, 8, 128, seed=1)
    passes = []

    def counted(*args, **kwargs):
        passes.append(args[1].dtype)
        return scores(*args, **kwargs)

    *int8_best, rescored = exact_topk_int8(queries, Pieces(items), quantize_items(items), 10, alpha=0.0, score=counted)
    assert passes == [torch.float32, torch.int8, torch.float32]  # the global cosine, all in int8, all in float32
    assert (rescored < 20).all()
    for search in (search_full, search_rounded):
        assert_same(search(queries, items, 10, alpha=0.0), int8_best)


def test_items_that_int8_cannot_tell_apart_are_all_scored_again():
    queries, items = make(2, 4, 32), make(1, 5, 32, seed=1).expand(30, -1, -1)
    rescored = exact_topk_int8(queries, Pieces(items), quantize_items(items), 3, alpha=0.8, score=scores)[2]
    assert rescored.tolist() == [30, 30]


@pytest.mark.parametrize("longer", [1.1, 30.0])
def test_rows_that_are_longer_than_the_bound_counts_on_are_refused(longer):
    queries, items = make(2, 4, 16), longer * make(9, 5, 16, seed=1)
    for search in (search_full, search_rounded):
        with pytest.raises(
            InputError, match=rf"expected items with rows of norm 1, got {longer:.3g}.*; normalise them"
        ):
            search(queries, items, 3, alpha=0.8)
    assert search_int8(queries, items, 3, alpha=0.8)[1].shape == (2, 3)  # its bound knows the norms


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1, 1.5])
def test_k_below_one_is_refused(search, k):
    with pytest.raises(InputError, match=f"expected k (to be an integer|of at least 1), got {k}"):
        search(make(2, 4, 16), make(9, 5, 16), k, alpha=0.8)


def test_quantized_items_of_other_items_are_refused():
    queries, items = make(2, 4, 16), make(9, 5, 16)
    with pytest.raises(InputError, match=r"expected quantized items \[9, 5, 16\], got \[8, 5, 16\]"):
        search_int8(queries, items, 3, alpha=0.8, quantized=quantize_items(items[:8]))
    mixed = quantize_items(items)._replace(scales=torch.ones(8, 5))
    with pytest.raises(InputError, match=r"expected quantized items \[9, 5\], got \[8, 5\]; quantize these items"):
        search_int8(queries, items, 3, alpha=0.8, quantized=mixed, among=torch.tensor([8]))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 3),
    st.lists(st.integers(0, 12), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.8, 1.0]),
    st.booleans(),
)
def test_items_kept_in_int8_alone_are_what_it_stands_for(
    seed: int, sizes: list[int], alpha: float, subset: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(sum(sizes), 3, 8, generator=generator), dim=-1)
    queries = F.normalize(torch.randn(4, 2, 8, generator=generator), dim=-1)
    values, scales = quantize(rows)
    anchors = rows[:, :1].half()
    items = values * scales[..., None]
    items[:, :1] = anchors
    quantized = QuantizedItems(values, scales, error_terms(items, values, scales), anchors)
    among = torch.arange(0, sum(sizes), 2) if subset else None
    expected = clim_topk(queries, items, 3, alpha=alpha, among=among)
    pieces = QuantizedItems(*(list(field.split(sizes)) for field in quantized))
    for given_items in (quantized, pieces):
        scores, indices, _ = clim_topk_int8(queries, None, given_items, 3, alpha=alpha, among=among)
        assert torch.equal(scores, expected[0])
        assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("search", [search_full, search_int8])
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_no_product_of_a_search_is_rounded_whatever_the_process_has_chosen(search, precision):
    """The errors that both count on are those of float32; on a GPU "high" means TF32's ten bits."""
    inside = []

    def score(*rows, **options):
        inside.append((torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32))
        return scores(*rows, **options)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        search(make(2, 3, 16), make(50, 3, 16, seed=1), 5, alpha=0.8, score=score)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(inside) == {("highest", False)}


@pytest.mark.parametrize("queries_dtype", DTYPES)
@pytest.mark.parametrize("storage", ["int8 alone", "int8 beside the items", "items"])
def test_the_fused_kernels_are_given_rows_of_one_dtype(monkeypatch, queries_dtype, storage):
    """An index kept in int8 has float16 anchors and float32 queries: of two dtypes the kernels would run nothing."""
    calls = []

    def clim_scores(queries, items, **options):
        calls.append((queries.dtype, items.dtype))
        return scores(queries, items, **options)

    monkeypatch.setattr(_search.dispatch, "choose", lambda device: Choice("triton", "a test"))
    monkeypatch.setattr(_search, "clim_scores", clim_scores)
    monkeypatch.setattr(_search, "_CONVERTED_ELEMENTS", 500)
    queries, items = make(2, 3, 16, dtype=queries_dtype), make(50, 3, 16, seed=1, dtype=torch.float16)
    quantized = quantize_items(items)
    by_int8 = partial(clim_topk_int8, queries, quantized=quantized, k=5)
    actual = {
        "int8 alone": lambda: by_int8(items=None)[:2],
        "int8 beside the items": lambda: by_int8(items=items)[:2],
        "items": lambda: clim_topk(queries, items, 5),
    }[storage]()
    assert calls
    assert all(query_dtype == item_dtype for query_dtype, item_dtype in calls)
    monkeypatch.undo()
    expected = by_int8(items=None)[:2] if storage == "int8 alone" else clim_topk(queries, items, 5)
    assert all(map(torch.equal, actual, expected))


def test_a_pass_over_items_made_of_int8_makes_few_at_a_time(monkeypatch):
    """All items in float32 would not fit on a GPU where the int8 does."""
    monkeypatch.setattr(_rows, "_COPY_BYTES", 10 * 3 * 16 * 4)
    sizes = []

    def score(queries, items, **options):
        if items.dtype == torch.float32 and items.shape[1] == 3:
            sizes.append(len(items))
        return scores(queries, items, **options)

    items = make(1, 3, 16).expand(100, 3, 16).half()  # int8 leaves all of them open
    quantized = quantize_items(items)
    pieces = _rows.Dequantized(quantized.values, quantized.scales, quantized.anchors)
    exact_topk_int8(make(1, 3, 16), pieces, quantized, 5, alpha=0.8, score=score)
    assert max(sizes) <= 10


@pytest.mark.parametrize(
    ("queries", "items", "is_rounded"),
    [((1, 40), 20_000, True), ((1, 13), 20_000, False), ((1, 40), 3_000, False), ((100, 13), 1_000, True)],
)
def test_a_pass_is_rounded_where_that_pays(monkeypatch, queries, items, is_rounded):
    monkeypatch.setattr(_search.cpu, "rounding_error", lambda _: 0.01)
    monkeypatch.setattr(_search.dispatch, "choose", lambda *_: Choice("blocked", ""))
    stored = torch.empty(1, queries[1], 4).expand(items, -1, -1)
    error = _search._rounding_error(torch.empty(*queries, 4), Pieces(stored))
    assert (error is not None) is is_rounded
