"""Late interaction: the formula, its symmetries, its gradient, low precision, ranking, and what is refused."""

from __future__ import annotations

import doctest
import importlib
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast.errors import InputError
from finelip_fast.kernels import QuantizedItems, clim_scores, clim_topk, clim_topk_int8, quantize, quantize_items
from finelip_fast.kernels.clim import formula

ALPHAS = [0.0, 0.3, 0.8, 1.0]


def make(*shape, seed=0, device="cpu"):
    """Random embeddings: unit rows ``[..., D]``."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1).to(device)


def expected_scores(method, queries, items, alpha):
    queries, items = (t.detach().double().cpu().numpy() for t in (queries, items))
    return method.score_matrix(queries, items, alpha)


def largest_error(actual, expected):
    return float(np.abs(actual.detach().double().cpu().numpy() - expected).max(initial=0.0))


sizes = st.fixed_dictionaries(
    {
        "n_queries": st.integers(0, 4),
        "n_items": st.integers(0, 6),
        "query_tokens": st.integers(0, 9),
        "item_tokens": st.integers(0, 17),
        "width": st.integers(8, 96),
        "seed": st.integers(0, 2**16),
    }
)


def make_pair(size, device):
    queries = make(size["n_queries"], size["query_tokens"], size["width"], seed=size["seed"], device=device)
    items = make(size["n_items"], size["item_tokens"], size["width"], seed=size["seed"] + 1, device=device)
    return queries, items


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_matches_add_up_to_the_fine_score(rows, columns, seed):
    queries, items = make(1, rows, 8, seed=seed), make(1, columns, 8, seed=seed + 1)
    similarity = queries[0] @ items[0].T
    weights = formula.match_weights(similarity)
    assert (weights * similarity).sum().item() == pytest.approx(clim_scores(queries, items, alpha=0.0).item(), abs=1e-6)
    best = (similarity == similarity.amax(dim=1, keepdim=True)) | (similarity == similarity.amax(dim=0, keepdim=True))
    assert torch.equal(weights > 0, best)


@given(size=sizes, alpha=st.sampled_from(ALPHAS))
@settings(max_examples=60, deadline=None)
def test_equals_the_method(method, device, size, alpha):
    queries, items = make_pair(size, device)
    scores = clim_scores(queries, items, alpha=alpha)
    assert scores.shape == (len(queries), len(items))
    assert scores.dtype == torch.float32
    assert largest_error(scores, expected_scores(method, queries, items, alpha)) <= 1e-5


# ``(Q, L_q, N, L_i, D)`` about those of models: whole tiles and one more or less, odd tokens, every width of CLIP.
MODEL_SIZES = [
    (1, 40, 300, 40, 512),
    (3, 52, 129, 52, 768),
    (9, 41, 17, 39, 640),
    (65, 40, 5, 52, 96),
    (2, 1, 130, 40, 1024),
    (2, 33, 127, 1, 1280),
    (1, 128, 1, 129, 512),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", MODEL_SIZES, ids=str)
def test_equals_the_method_at_the_sizes_of_models(method, device, size, dtype):
    n_queries, query_tokens, n_items, item_tokens, width = size
    queries = make(n_queries, query_tokens, width, device=device).to(dtype)
    items = make(n_items, item_tokens, width, seed=1, device=device).to(dtype)
    for alpha in (0.0, 0.8):
        scores = clim_scores(queries, items, alpha=alpha)
        assert largest_error(scores, expected_scores(method, queries, items, alpha)) <= 1e-5


@pytest.mark.parametrize(("query_tokens", "item_tokens"), [(0, 5), (5, 0), (0, 0)])
def test_an_empty_set_scores_zero(device, query_tokens, item_tokens):
    queries, items = make(2, query_tokens, 16, device=device), make(3, item_tokens, 16, device=device)
    scores = clim_scores(queries, items)
    assert scores.device == queries.device
    assert torch.equal(scores, torch.zeros(2, 3, device=device))


@given(size=sizes, alpha=st.sampled_from(ALPHAS))
@settings(max_examples=25, deadline=None)
def test_swapping_the_sides_transposes(device, size, alpha):
    queries, items = make_pair(size, device)
    unswapped, swapped = clim_scores(queries, items, alpha=alpha), clim_scores(items, queries, alpha=alpha)
    torch.testing.assert_close(unswapped, swapped.T, rtol=0, atol=1e-6)


@given(size=sizes.filter(lambda size: size["query_tokens"] and size["item_tokens"]))
@settings(max_examples=25, deadline=None)
def test_the_order_of_tokens_after_row_0_does_not_matter(device, size):
    queries, items = make_pair(size, device)
    generator = torch.Generator().manual_seed(size["seed"])
    shuffled = [
        torch.cat([t[:, :1], t[:, 1 + torch.randperm(t.shape[1] - 1, generator=generator).to(device)]], dim=1)
        for t in (queries, items)
    ]
    torch.testing.assert_close(clim_scores(*shuffled), clim_scores(queries, items), rtol=0, atol=1e-6)


def test_row_0_alone_counts_for_the_global_cosine(device):
    queries, items = make(3, 5, 32, device=device), make(4, 6, 32, seed=1, device=device)
    cosine = queries[:, 0] @ items[:, 0].T
    torch.testing.assert_close(clim_scores(queries, items, alpha=1.0), cosine, rtol=0, atol=1e-6)
    fine = clim_scores(queries, items, alpha=0.0)
    torch.testing.assert_close(clim_scores(queries, items), 0.8 * cosine + 0.2 * fine, rtol=0, atol=1e-6)
    torch.testing.assert_close(clim_scores(queries.flip(1), items, alpha=0.0), fine, rtol=0, atol=1e-6)


def test_the_ends_of_the_scale(device):
    rows = make(1, 7, 32, device=device)
    single = rows[:, :1]
    assert clim_scores(rows, rows, alpha=0.0).item() == pytest.approx(2.0, abs=1e-6)
    assert clim_scores(single, -single, alpha=0.0).item() == pytest.approx(-0.2, abs=1e-6)
    assert clim_scores(single, -single, alpha=1.0).item() == pytest.approx(-1.0, abs=1e-6)


@pytest.mark.parametrize("elements", [1, 30, 100, 10_000])
@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_the_blocks_of_the_reference_change_nothing(monkeypatch, device, elements, alpha):
    monkeypatch.setenv("FINELIP_KERNELS", "reference")
    queries, items = make(7, 5, 32, device=device), make(11, 6, 32, seed=1, device=device)
    expected = clim_scores(queries, items, alpha=alpha)
    monkeypatch.setattr(formula, "TILE_ELEMENTS", elements)
    torch.testing.assert_close(clim_scores(queries, items, alpha=alpha), expected, rtol=0, atol=1e-6)


def test_batches_of_queries_and_of_items_join_to_the_whole(device):
    queries, items = make(5, 4, 32, device=device), make(9, 6, 32, seed=1, device=device)
    parts = [torch.cat([clim_scores(q, i) for i in items.split(4)], dim=1) for q in queries.split(2)]
    torch.testing.assert_close(torch.cat(parts), clim_scores(queries, items), rtol=0, atol=1e-6)


def in_float64(queries, items, alpha):
    """The formula, pair by pair, for autograd in float64; a maximum is the entry of one winner, picked by its index."""
    rows = []
    for query in queries:
        for item in items:
            s = query @ item.T
            leaky = torch.where(s > 0, s, 0.1 * s)
            by_row = leaky[range(len(query)), s.detach().cpu().numpy().argmax(1)].mean()
            by_column = leaky[s.detach().cpu().numpy().argmax(0), range(len(item))].mean()
            rows.append(alpha * s[0, 0] + (1 - alpha) * (by_row + by_column))
    return torch.stack(rows).view(len(queries), len(items))


@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.0])
@pytest.mark.parametrize(("query_tokens", "item_tokens"), [(1, 1), (1, 6), (5, 1), (4, 7)])
def test_gradient_equals_float64s(device, query_tokens, item_tokens, alpha):
    # With one token a side, about half the maxima are negative and take the leaky slope.
    queries, items = make(3, query_tokens, 24, device=device), make(5, item_tokens, 24, seed=1, device=device)
    weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(2)).to(device)
    leaves = [t.clone().requires_grad_() for t in (queries, items)]
    exact = [t.double().requires_grad_() for t in (queries, items)]
    actual = torch.autograd.grad((clim_scores(*leaves, alpha=alpha) * weights).sum(), leaves)
    expected = torch.autograd.grad((in_float64(*exact, alpha) * weights.double()).sum(), exact)
    for gradient, expected_gradient in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=1e-5)


def test_the_gradient_of_a_tie_goes_to_one_winner(device):
    query = torch.zeros(1, 1, 8, device=device)
    query[..., 0] = 1.0
    items = query.repeat(1, 3, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(clim_scores(query, items, alpha=0.0).sum(), items)
    # Every item row meets the query (a third each); the query's own maximum counts for one of the three.
    assert sorted(gradient[0, :, 0].tolist()) == pytest.approx([1 / 3, 1 / 3, 4 / 3])


def test_the_gradient_of_an_empty_set_is_nothing(device):
    queries, items = make(2, 0, 16, device=device), make(3, 4, 16, device=device).requires_grad_()
    scores = clim_scores(queries, items)
    assert not (scores.requires_grad and torch.autograd.grad(scores.sum(), items)[0].any())


def in_plain_pytorch(queries, items, alpha):
    """The formula in the inputs' dtype, as one would write it without care."""
    s = torch.einsum("qld,nmd->qnlm", queries, items)
    leaky = F.leaky_relu(s, 0.1)
    return alpha * s[..., 0, 0] + (1 - alpha) * (leaky.amax(3).mean(2) + leaky.amax(2).mean(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("query_tokens", "item_tokens", "width"), [(1, 1, 8), (7, 13, 65), (40, 40, 512)])
def test_low_precision_is_at_most_twice_as_far_off_as_pytorch(method, device, dtype, query_tokens, item_tokens, width):
    queries = make(3, query_tokens, width, device=device).to(dtype)
    items = make(4, item_tokens, width, seed=1, device=device).to(dtype)
    expected = expected_scores(method, queries, items, 0.8)
    scores = clim_scores(queries, items)
    assert scores.dtype == torch.float32
    plain = largest_error(in_plain_pytorch(queries, items, 0.8), expected)
    assert largest_error(scores, expected) <= 2 * plain + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_gradients_come_back_in_their_inputs_dtype(device, dtype):
    leaves = [make(3, 5, 64, seed=seed, device=device).to(dtype).requires_grad_() for seed in (0, 1)]
    wide = [t.detach().float().requires_grad_() for t in leaves]
    actual = torch.autograd.grad(clim_scores(*leaves).sum(), leaves)
    expected = torch.autograd.grad(clim_scores(*wide).sum(), wide)
    for gradient, expected_gradient in zip(actual, expected, strict=True):
        assert gradient.dtype == dtype
        error = (gradient.float() - expected_gradient).abs().max().item()
        assert error <= 4 * torch.finfo(dtype).eps * max(1.0, expected_gradient.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(device, dtype):
    queries, items = make(3, 5, 64, device=device), make(4, 6, 64, seed=1, device=device)
    with torch.autocast(device, dtype=dtype):
        inside = clim_scores(queries, items)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, clim_scores(queries, items))


@pytest.mark.parametrize(
    "dtypes", [(torch.float64, torch.float64), (torch.float32, torch.float64), (torch.float16, torch.bfloat16)], ids=str
)
def test_what_the_kernels_do_not_take_is_scored_all_the_same(method, device, dtypes):
    queries, items = (
        make(3, 5, 64, seed=seed, device=device).to(dtype).requires_grad_() for seed, dtype in enumerate(dtypes)
    )
    assert (
        largest_error(clim_scores(queries.detach(), items.detach()), expected_scores(method, queries, items, 0.8))
        <= 1e-5
    )
    exact = [t.detach().double().requires_grad_() for t in (queries, items)]
    actual = torch.autograd.grad(clim_scores(queries, items).sum(), (queries, items))
    expected = torch.autograd.grad(in_float64(*exact, 0.8).sum(), exact)
    assert tuple(gradient.dtype for gradient in actual) == dtypes
    for gradient, expected_gradient in zip(actual, expected, strict=True):
        allowed = max(1e-5, 2 * torch.finfo(gradient.dtype).eps)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=allowed)


@pytest.mark.parametrize("forced", ["", "reference"])
@pytest.mark.parametrize("width", [40, 512])
def test_int8_rows_equal_their_true_values(monkeypatch, method, device, forced, width):
    monkeypatch.setenv("FINELIP_KERNELS", forced)
    # Rows of different lengths, so that a scale at the wrong place shows.
    lengths = torch.linspace(0.5, 2, 9, device=device)[:, None]
    queries, query_scales = quantize(make(3, 9, width, device=device) * lengths)
    items, item_scales = quantize(make(130, 4, width, seed=1, device=device) * lengths[:4])
    scores = clim_scores(queries, items, query_scales=query_scales, item_scales=item_scales)
    true = queries.double() * query_scales[..., None], items.double() * item_scales[..., None]
    assert largest_error(scores, expected_scores(method, *true, 0.8)) <= 1e-5


def test_strided_and_expanded_inputs(device):
    queries, items = make(3, 5, 64, device=device), make(4, 6, 64, seed=1, device=device)
    expected = clim_scores(queries, items)
    strided = queries.transpose(0, 2).contiguous().transpose(0, 2)
    wide = torch.stack([items, items], dim=-1)[..., 1]
    assert not strided.is_contiguous()
    torch.testing.assert_close(clim_scores(strided, wide), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        clim_scores(queries[:1].expand(3, -1, -1), items[:, ::2]),
        clim_scores(queries[:1], items[:, ::2].clone()).expand(3, -1),
        rtol=0,
        atol=1e-6,
    )


def test_the_graph_has_no_break(device):
    queries, items = make(3, 5, 64, device=device), make(4, 6, 64, seed=1, device=device)
    compiled = torch.compile(clim_scores, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(queries, items), clim_scores(queries, items), rtol=0, atol=1e-6)


def test_an_exported_program_has_operations_of_pytorch_alone(device):
    class Scores(torch.nn.Module):
        def forward(self, queries, items):
            return clim_scores(queries, items)

    queries, items = make(3, 5, 64, device=device), make(4, 6, 64, seed=1, device=device)
    sizes = {"queries": {0: torch.export.Dim("Q")}, "items": {0: torch.export.Dim("N")}}
    program = torch.export.export(Scores(), (queries, items), dynamic_shapes=sizes)
    assert not [node for node in program.graph.nodes if "finelip" in str(node.target)]
    queries, items = make(2, 5, 64, seed=2, device=device), make(9, 6, 64, seed=3, device=device)
    torch.testing.assert_close(
        program.module()(queries, items), clim_scores(queries, items), rtol=0, atol=1e-6 if device == "cpu" else 1e-5
    )


# Ranking -------------------------------------------------------------------------------------------------------------


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
    alpha=st.sampled_from(ALPHAS),
)
@settings(max_examples=60, deadline=None)
def test_topk_is_best_first_and_ties_go_to_the_lower_index(device, queries, items, k, alpha):
    queries, items = axes(queries).to(device), axes(items).to(device)
    scores, indices = clim_topk(queries, items, k, alpha=alpha)
    assert scores.shape == indices.shape == (len(queries), min(k, len(items)))
    assert (scores.dtype, indices.dtype) == (torch.float32, torch.int64)
    for row, best, ranking in zip(clim_scores(queries, items, alpha=alpha).tolist(), scores, indices, strict=True):
        order = sorted(range(len(items)), key=lambda i, row=row: (-row[i], i))[:k]
        assert ranking.tolist() == order
        assert best.tolist() == pytest.approx([row[i] for i in order], abs=1e-6)


@pytest.mark.parametrize("copies", [2, 5, 33])
def test_topk_keeps_copies_of_an_item_in_order(device, copies):
    # Unit rows of four halves: every product is exact, so that copies score the same bits wherever they stand.
    generator = torch.Generator().manual_seed(0)
    rows = torch.zeros(10 * 6, 96)
    for row in rows:
        row[torch.randperm(96, generator=generator)[:4]] = torch.randint(0, 2, (4,), generator=generator) - 0.5
    queries, items = rows.view(10, 6, 96).to(device).split([3, 7])
    scores, indices = clim_topk(queries, items.repeat(copies, 1, 1), 7 * copies)
    best, order = clim_topk(queries, items, 7)
    for row in range(3):
        groups = {}  # items that tie, copies or not, in the order of their score
        for value, index in zip(best[row].tolist(), order[row].tolist(), strict=True):
            groups.setdefault(value, []).extend(range(index, 7 * copies, 7))
        assert indices[row].tolist() == [index for group in groups.values() for index in sorted(group)]
    assert torch.equal(scores, best.repeat_interleave(copies, dim=1))


def test_topk_equals_the_method(method, device):
    queries, items = make(3, 5, 96, device=device), make(50, 6, 96, seed=1, device=device)
    scores, indices = clim_topk(queries, items, 10)
    expected = expected_scores(method, queries, items, 0.8)
    np.testing.assert_array_equal(indices.cpu().numpy(), np.argsort(-expected, axis=1)[:, :10])
    assert largest_error(scores, -np.sort(-expected, axis=1)[:, :10]) <= 1e-5


@pytest.mark.parametrize("token", [0, 3], ids=["global", "other"])
def test_topk_ranks_nan_last(device, token):
    queries, items = make(2, 4, 16, device=device), make(9, 5, 16, seed=1, device=device)
    items[[1, 6], token, 2] = math.nan
    scores, indices = clim_topk(queries, items, 9)
    assert indices[:, 7:].tolist() == [[1, 6], [1, 6]]
    assert scores[:, 7:].isnan().all()
    expected = clim_scores(queries, items).nan_to_num(-9).sort(descending=True).values
    torch.testing.assert_close(scores[:, :7], expected[:, :7], rtol=0, atol=1e-6)


def test_topk_of_a_query_that_is_nan_keeps_the_order_of_the_items(device):
    queries, items = make(2, 4, 16, device=device), make(9, 5, 16, seed=1, device=device)
    queries[1, 2, 0] = math.nan
    scores, indices = clim_topk(queries, items, 4)
    assert scores[0].isfinite().all()
    assert scores[1].isnan().all()
    assert indices[1].tolist() == [0, 1, 2, 3]


def test_topk_needs_no_gradient(device):
    queries, items = make(2, 4, 16, device=device).requires_grad_(), make(9, 5, 16, seed=1, device=device)
    assert not clim_topk(queries, items, 3)[0].requires_grad


def test_topk_of_pieces_and_of_a_choice(device):
    queries, items = make(2, 4, 16, device=device), make(30, 5, 16, seed=1, device=device)
    chosen = torch.tensor([0, 3, 4, 5, 20, 29])
    quantized = QuantizedItems(*(field.split(7) for field in quantize_items(items)))
    for among, of in [(None, torch.arange(30)), (chosen, chosen), (chosen.to(device), chosen)]:
        scores, order = clim_topk(queries, items[of.to(device)], 7)
        for source in (items, list(items.split(8)), items.tensor_split([0, 1, 25])):
            for best, indices, *_ in (
                clim_topk(queries, source, 7, among=among),
                clim_topk_int8(queries, source, quantized, 7, among=among),
            ):
                assert torch.equal(best, scores)
                assert torch.equal(indices, of.to(device)[order])


@pytest.mark.parametrize("k", [0, -1])
def test_topk_refuses_k_below_one(k):
    with pytest.raises(InputError, match=f"expected k of at least 1, got {k}"):
        clim_topk(make(2, 4, 16), make(9, 5, 16), k)


@pytest.mark.parametrize(
    ("queries", "items"), [((4, 16), (9, 5, 16)), ((2, 4, 16), (5, 16)), ((2, 4, 16), (9, 5, 15))], ids=str
)
def test_shapes_that_do_not_fit_are_refused(queries, items):
    got = "16 and 15" if items[-1] == 15 else re.escape(f"{list(queries)} and {list(items)}")
    message = rf"expected queries \[Q, L_q, D\] and items \[N, L_i, D\].*, got {got}"
    with pytest.raises(InputError, match=message):
        clim_scores(torch.ones(queries), torch.ones(items))
    with pytest.raises(InputError, match=message):
        clim_topk(torch.ones(queries), torch.ones(items), 3)


def test_docstring_example():
    results = doctest.testmod(importlib.import_module("finelip_fast.kernels.clim.ops"))
    assert results.attempted > 0
    assert results.failed == 0
