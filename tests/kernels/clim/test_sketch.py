"""Sketches: what their codes stand for, estimates within the stated error, candidates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finelip_fast.errors import InputError
from finelip_fast.kernels import clim_scores, cosine_candidates, cpu, quantize
from finelip_fast.kernels.clim.sketch import (
    SketchBasis,
    blocks,
    fine_estimates,
    row_bytes,
    sketch_basis,
    sketch_candidates,
    sketch_items,
)


def unit_rows(*shape: int, seed: int = 0, directions: int | None = None) -> Tensor:
    """Unit rows; with ``directions`` most of each lies in so many."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*shape, generator=generator)
    if directions is not None:
        rows[..., directions:] *= 0.05
    return torch.nn.functional.normalize(rows, dim=-1)


def globals_of(items: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = quantize(items[:, :1])
    return values[:, 0].contiguous(), scales[:, 0].contiguous()


def sketched(items: Tensor, bits: int = 1) -> tuple[SketchBasis, list[Tensor]]:
    basis = sketch_basis(items.flatten(0, 1), bits=bits)
    return basis, blocks(sketch_items(items, basis), items.shape[1], basis)


@pytest.mark.parametrize(("width", "bits"), [(1, 1), (12, 2), (64, 1), (128, 1), (128, 2), (200, 1)])
def test_an_item_takes_the_stated_bytes(width: int, bits: int) -> None:
    items = unit_rows(70, 3, width)
    basis, parts = sketched(items, bits)
    assert basis.row_bytes == row_bytes(width, bits)
    assert sum(part.nbytes for part in parts) == 70 * 3 * row_bytes(width, bits)
    assert sum(part.shape[2] for part in parts) == 70


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("directions", [None, 12])
def test_cosines_are_unbiased_within_the_stated_error(bits: int, directions: int | None) -> None:
    rows = unit_rows(3000, 1, 64, directions=directions)
    queries = unit_rows(200, 1, 64, seed=1, directions=directions)
    basis, parts = sketched(rows, bits)
    # Of sets of one row late interaction is twice the cosine's leaky ReLU.
    estimates, cosines = fine_estimates(queries, basis, parts) / 2, queries[:, 0] @ rows[:, 0].T
    estimates, cosines = torch.where(estimates < 0, 10 * estimates, estimates).flatten(), cosines.flatten()
    error = estimates - cosines
    assert error.square().mean().sqrt() < 1.15 * basis.error
    assert error.mean().abs() < 0.1 * basis.error
    slope = (estimates * cosines).sum() / cosines.square().sum()
    assert abs(slope - 1) < 0.05


def test_two_bits_are_better_than_one() -> None:
    rows = unit_rows(4000, 64)
    assert sketch_basis(rows, bits=2).error < 0.7 * sketch_basis(rows, bits=1).error


def test_few_directions_get_the_bits_and_many_the_columns() -> None:
    narrow_basis, wide_basis = sketch_basis(unit_rows(4000, 128, directions=16)), sketch_basis(unit_rows(20_000, 128))
    assert (narrow_basis.bits, narrow_basis.projection.shape) == (4, (128, 32))
    assert wide_basis.bits < 4
    assert narrow_basis.error < wide_basis.error


@settings(max_examples=40, deadline=None)
@given(
    n_items=st.integers(1, 150),
    tokens=st.integers(1, 5),
    query_tokens=st.integers(1, 5),
    width=st.integers(1, 80),
    bits=st.sampled_from([1, 2]),
    seed=st.integers(0, 9),
)
def test_estimates_are_those_of_the_numbers_that_codes_stand_for(
    n_items: int, tokens: int, query_tokens: int, width: int, bits: int, seed: int
) -> None:
    """Unpacked one by one and scored as late interaction is defined, up to the rounding of the query."""
    items = unit_rows(n_items, tokens, width, seed=seed)
    queries = unit_rows(2, query_tokens, width, seed=seed + 100)
    basis, parts = sketched(items, bits)
    per_half, offset = 4 // basis.bits, (2**basis.bits - 1) / 2
    decoded = []
    for part in parts:
        halves = [
            (part >> (4 * half + basis.bits * place)) & (2**basis.bits - 1)
            for half in (0, 1)
            for place in range(per_half)
        ]
        decoded.append((torch.cat(halves).permute(2, 1, 0) - offset) * basis.unit)
    projected = queries @ basis.projection
    expected = clim_scores(projected, torch.cat(decoded), alpha=0.0)
    estimates = fine_estimates(queries, basis, parts)
    # A weight is off by half a unit, times two to the power of its place.
    largest = projected.abs().amax() / 127 * 2 ** (4 - basis.bits) / 2
    columns = basis.projection.shape[1]
    assert torch.allclose(
        estimates, expected, atol=float(2 * largest * basis.unit * (2 * offset) * columns + 1e-4), rtol=0
    )


@settings(max_examples=25, deadline=None)
@given(
    n_items=st.integers(1, 200),
    count=st.integers(1, 210),
    alpha=st.floats(0, 1),
    among=st.one_of(st.none(), st.sets(st.integers(0, 199), min_size=1)),
    seed=st.integers(0, 9),
)
def test_candidates_are_as_many_as_asked_for_and_each_once(
    n_items: int, count: int, alpha: float, among: set[int] | None, seed: int
) -> None:
    items, queries = unit_rows(n_items, 3, 16, seed=seed), unit_rows(2, 4, 16, seed=seed + 50)
    chosen = None if among is None else torch.tensor(sorted(n for n in among if n < n_items), dtype=torch.int64)
    candidates = sketch_candidates(queries, *sketched(items), *globals_of(items), count, alpha=alpha, among=chosen)
    allowed = range(n_items) if chosen is None else chosen.tolist()
    assert candidates.shape == (2, min(count, len(allowed)))
    assert (candidates.diff(dim=1) > 0).all()
    assert set(candidates.flatten().tolist()) <= set(allowed)
    if count >= len(allowed):
        assert candidates[0].tolist() == list(allowed)  # none is lost


def test_with_the_cosine_alone_candidates_are_those_of_global_rows() -> None:
    items, queries = unit_rows(500, 3, 32), unit_rows(3, 2, 32, seed=1)
    values, scales = globals_of(items)
    candidates = sketch_candidates(queries, *sketched(items), values, scales, 20, alpha=1.0)
    assert torch.equal(candidates, cosine_candidates(queries[:, 0], values, scales, 20))


def test_candidates_see_tokens() -> None:
    """Items whose global rows are all alike are told apart by their tokens."""
    items = unit_rows(400, 6, 64, directions=16)
    items[:, 0] = items[0, 0]
    queries = items[::40].clone()
    candidates = sketch_candidates(queries, *sketched(items), *globals_of(items), 5, alpha=0.25)
    assert [number in row for number, row in zip(range(0, 400, 40), candidates.tolist(), strict=True)] == [True] * 10


def test_blocks_threads_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    items, queries = unit_rows(300, 4, 32), unit_rows(5, 3, 32, seed=1)
    basis, parts = sketched(items)
    expected = fine_estimates(queries, basis, parts)
    cut = [piece.contiguous() for part in parts for piece in part.split(37, dim=2)]
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.allclose(fine_estimates(queries, basis, cut), expected, atol=1e-6)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    alone = torch.cat([fine_estimates(query, basis, parts) for query in queries.split(1)])
    assert torch.equal(alone, expected)
    monkeypatch.setattr(cpu, "has", lambda feature: False)  # a processor without products of int8
    assert torch.allclose(fine_estimates(queries, basis, parts), expected, atol=1e-6)


def test_rows_of_zeros_have_a_sketch() -> None:
    items = torch.zeros(5, 2, 8)
    assert fine_estimates(unit_rows(1, 2, 8), *sketched(items)).isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sketch_basis(torch.ones(3, 4), bits=3), "expected bits to be 1 or 2"),
        (lambda: sketch_basis(torch.ones(3, 4), bits=True), "expected bits to be 1 or 2"),
        (lambda: sketch_basis(torch.ones(0, 4)), "expected rows"),
        (lambda: sketch_basis(torch.ones(3, 9000)), "D from 1 to 8192"),
        (lambda: sketch_basis(torch.ones(3, 4, dtype=torch.int8)), "float dtype"),
        (lambda: sketch_items(torch.ones(3, 2, 5), sketch_basis(torch.ones(3, 4))), r"expected items \[N, L, 4\]"),
    ],
)
def test_what_makes_no_sketch_is_refused(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": torch.ones(1, 2, 9)}, "expected queries"),
        ({"queries": torch.ones(2, 8)}, "expected queries"),
        ({"count": 0}, "count"),
        ({"alpha": 2.0}, "alpha"),
        ({"items": torch.zeros(3, 8, dtype=torch.int8)}, "global embeddings of the 5 items"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, object], message: str) -> None:
    items = unit_rows(5, 2, 8)
    basis, parts = sketched(items)
    values, scales = globals_of(items)
    valid_arguments: dict[str, object] = {"queries": unit_rows(1, 2, 8), "basis": basis, "blocks": parts}
    valid_arguments |= {"items": values, "item_scales": scales, "count": 2, "alpha": 0.5}
    with pytest.raises(InputError, match=message):
        sketch_candidates(**(valid_arguments | arguments))  # type: ignore[arg-type]
