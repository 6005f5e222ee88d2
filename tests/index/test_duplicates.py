"""Duplicate items."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast.errors import InputError
from finelip_fast.index import Index, IndexSpec
from finelip_fast.index import duplicates as module
from finelip_fast.index.duplicates import duplicates
from finelip_fast.index.reader import CatalogueReader, Item


def index_of(rows: torch.Tensor, hashes: list[str | None]) -> Index:
    index = Index(IndexSpec("abc", 1, rows.shape[1]))
    metadata = [{} if value is None else {"sha256": value} for value in hashes]
    index.add([str(row) for row in range(len(rows))], rows[:, None], metadata)
    return index


def test_the_same_content_is_a_group() -> None:
    rows = torch.eye(6)
    index = index_of(rows, ["a", "b", "a", None, "b", "a"])
    assert duplicates(index) == [["0", "2", "5"], ["1", "4"]]
    assert duplicates(index_of(rows, [None] * 6)) == []
    assert duplicates(Index(IndexSpec("abc", 1, 6)), similarity=0.9) == []


@given(st.integers(0, 40), st.integers(0, 2**31), st.floats(0.5, 0.99))
@settings(max_examples=40, deadline=None)
def test_what_is_near_is_a_group_with_all_that_is_near_to_it(count: int, seed: int, similarity: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1).half().float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", 7)
        groups = duplicates(index_of(rows, [None] * count), similarity=similarity)
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    near = unit @ unit.T >= similarity
    for _ in range(count):
        near = near | (near.double() @ near.double() > 0)
    expected = {tuple(near[row].nonzero()[:, 0].tolist()) for row in range(count) if near[row].sum() > 1}
    assert [tuple(map(int, group)) for group in groups] == sorted(expected)


def test_only_items_are_grouped_and_the_groups_are_those_of_one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_of(torch.eye(5)[[0, 1, 1, 2, 1]], [None] * 5)
    index.delete(["0", "2"])
    items = CatalogueReader.items

    def changed(*arguments: Any, **options: Any) -> Iterator[Item]:
        """List the items, after which another thread adds one."""
        yield from items(*arguments, **options)
        if "new" not in index:
            index.add(["new"], torch.eye(5)[1:2, None], [{}])

    monkeypatch.setattr(CatalogueReader, "items", changed)
    assert duplicates(index, similarity=0.9) == [["1", "4"]]
    assert duplicates(index, similarity=0.9) == [["1", "4", "new"]]


def test_a_similarity_is_a_cosine() -> None:
    with pytest.raises(InputError, match=r"expected similarity in \[0, 1\], got 98"):
        duplicates(Index(IndexSpec("abc", 1, 2)), similarity=98)
