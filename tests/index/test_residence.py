"""Segments on a GPU: the same rows in few buffers, with little duplicated. No GPU is needed: the CPU stands in for it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finelip_fast.index import Index, IndexSpec, residence, view
from finelip_fast.index.residence import Copies, resident
from finelip_fast.kernels.clim import search as clim_search

CPU = torch.device("cpu")
SPEC = IndexSpec(checkpoint="abc", tokens=3, width=16)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Free bytes of the GPU; the last value counts."""
    left = [1 << 40]
    monkeypatch.setattr(residence, "free_bytes", lambda device: left[-1])
    return left


class Collection:
    """A sequence of segments that come and go, with their resident copies."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.copies: list[Copies] = []

    def add(self, *lengths: int) -> Collection:
        start = int(sum(map(len, self.rows)))
        for length in lengths:
            self.rows.append(torch.arange(start, start + length)[:, None].repeat(1, 4).int())
            self.copies.append({})
            start += length
        return self

    def keep(self) -> list[Tensor]:
        return resident("rows", self.rows, self.copies, CPU)


def addresses(tensors: list[Tensor]) -> list[int]:
    return [tensor.untyped_storage().data_ptr() for tensor in tensors]


@pytest.mark.usefixtures("free")
def test_segments_that_come_together_share_a_buffer() -> None:
    collection = Collection().add(5, 1, 7)
    (buffer,) = collection.keep()
    assert torch.equal(buffer, torch.cat(collection.rows))
    assert addresses(collection.keep()) == addresses([buffer])  # nothing is copied again
    assert all(held["rows"].untyped_storage().data_ptr() == buffer.data_ptr() for held in collection.copies)


@pytest.mark.usefixtures("free")
def test_what_comes_later_leaves_a_large_buffer_where_it_is() -> None:
    collection = Collection().add(100)
    (large,) = collection.keep()
    for count in range(1, 40):
        buffers = collection.add(1).keep()
        assert torch.equal(torch.cat(buffers), torch.cat(collection.rows))
        assert len(buffers) <= 2 + count.bit_length()
        if count < 30:
            assert buffers[0].data_ptr() == large.data_ptr()


def test_only_a_tenth_of_what_is_free_is_held_twice(free: list[int]) -> None:
    collection = Collection().add(10)
    collection.keep()
    free.append(10 * 159)  # one byte less than ten rows of 16 need
    assert [len(buffer) for buffer in collection.add(10).keep()] == [10, 10]
    free.append(10 * 320)
    assert [len(buffer) for buffer in collection.add(10).keep()] == [30]


def test_what_does_not_fit_stays_where_it_is(free: list[int]) -> None:
    collection = Collection().add(10, 10)
    free.append(20 * 16)
    assert addresses(collection.keep()) == addresses(collection.rows)
    assert collection.copies == [{}, {}]


@pytest.mark.usefixtures("free")
def test_a_buffer_most_of_which_is_gone_is_given_back() -> None:
    collection = Collection().add(60, 20, 20)
    (buffer,) = collection.keep()
    del collection.rows[0], collection.copies[0]
    (rest,) = collection.keep()
    assert torch.equal(rest, torch.cat(collection.rows))
    assert rest.untyped_storage().nbytes() == rest.nbytes
    assert rest.data_ptr() != buffer.data_ptr()


@given(
    steps=st.lists(
        st.tuples(st.lists(st.integers(1, 9), max_size=3), st.sets(st.integers(0, 30), max_size=3), st.integers(0, 9)),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=60, deadline=None)
def test_whatever_comes_and_goes_the_rows_are_the_same(steps: list[tuple[list[int], set[int], int]]) -> None:
    collection = Collection()
    with pytest.MonkeyPatch.context() as patch:
        for lengths, deletions, budget in steps:
            patch.setattr(residence, "free_bytes", lambda device, budget=budget: 10 ** (budget + 1))
            collection.add(*lengths)
            stay = [number for number in range(len(collection.rows)) if number not in deletions]
            collection.rows = [collection.rows[number] for number in stay]
            collection.copies = [collection.copies[number] for number in stay]
            if collection.rows:
                buffers = collection.keep()
                assert torch.equal(torch.cat(buffers), torch.cat(collection.rows))
                assert len(buffers) <= len(collection.rows)


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("mode", ["exact", "exact-int8", "two-stage"])
def test_a_search_of_many_segments_launches_as_one_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """An index of 12 segments is one piece for the kernels; results equal those of mapped segments."""
    rows = torch.nn.functional.normalize(torch.randn(60, 3, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    monkeypatch.setenv("FINELIP_KERNELS", "reference")
    monkeypatch.setattr("finelip_fast.kernels.clim.rows._TINY_BYTES", 0)  # small pieces count, too
    calls = []
    score = clim_search.clim_scores
    monkeypatch.setattr(
        clim_search, "clim_scores", lambda *arguments, **options: calls.append(0) or score(*arguments, **options)
    )

    def search(folder: Path, parts: int, *, on_gpu: bool) -> tuple[Tensor, int]:
        with closing(Index(SPEC, folder)) as index:
            for numbers in torch.arange(60).tensor_split(parts):
                index.add([str(number) for number in numbers.tolist()], rows[numbers], [{}] * len(numbers))
        monkeypatch.setattr(view, "is_gpu", lambda device: on_gpu)
        calls.clear()
        with closing(Index(SPEC, folder)) as index:
            results = index.search(rows[:2], 5, mode=mode, candidates=20)
            loaded_rows = index._store.view().read(torch.tensor([59, 0, 31]))
        monkeypatch.setattr(view, "is_gpu", lambda device: False)
        assert torch.equal(loaded_rows, rows[[59, 0, 31]].half())
        return results.scores, len(calls)

    plain, launches_of_mapped = search(tmp_path / "mapped", 12, on_gpu=False)
    scores_of_one, launches = search(tmp_path / "one", 1, on_gpu=True)
    scores_of_many, launches_of_many = search(tmp_path / "many", 12, on_gpu=True)
    assert torch.equal(plain, scores_of_many)
    assert torch.equal(scores_of_one, scores_of_many)
    assert launches_of_many == launches
    assert mode == "two-stage" or launches_of_mapped > launches
