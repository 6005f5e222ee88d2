"""Items in pieces, and a choice of them: the same as if they were one tensor, and copied only where they must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast.errors import InputError
from finelip_fast.kernels.clim import rows as _rows
from finelip_fast.kernels.clim.rows import Pieces, chunks

CPU = torch.device("cpu")


def items(n):
    """Numbers ``[n, 2]`` that tell every item apart."""
    return torch.arange(2 * n).view(n, 2)


@st.composite
def pieces(draw, rows):
    """The same in pieces: tensors and arrays, some empty, some strided, some read-only."""
    cuts = draw(st.lists(st.integers(0, len(rows)), max_size=8).map(sorted))
    parts = list(rows.tensor_split(cuts))
    for at, piece in enumerate(parts):
        kind = draw(st.sampled_from(["tensor", "strided tensor", "array", "read-only", "strided", "reversed", "odd"]))
        if kind == "strided tensor":
            parts[at] = torch.stack([piece, piece + 1000], dim=1)[:, 0]
        elif kind != "tensor":
            parts[at] = array(piece.numpy(), kind)
    return parts


def array(values, kind):
    if kind == "read-only":
        values = values.copy()
        values.flags.writeable = False
    if kind == "strided":
        values = np.repeat(values, 3, axis=0)[::3]
        values.flags.writeable = False
    if kind == "reversed":
        values = values[::-1].copy()[::-1]
    if kind == "odd":  # a field of records whose size is no multiple of it
        records = np.zeros(len(values), dtype=[("flag", np.int8), ("row", np.int64, (2,))])
        records["row"] = values
        values = records["row"]
    return values


@st.composite
def cases(draw, sources=1):
    """What is chosen of ``[n, 2]``, its numbers, and that many times the same in pieces."""
    n = draw(st.integers(0, 30))
    among = draw(st.none() | st.sets(st.integers(0, max(0, n - 1)), max_size=n).map(sorted)) if n else None
    among = None if among is None else torch.tensor(among, dtype=torch.int64)
    numbers = torch.arange(n) if among is None else among
    rows = items(n)
    return rows[numbers], numbers, [Pieces(draw(pieces(rows))).only(among) for _ in range(sources)]


@given(case=cases(), data=st.data())
@settings(max_examples=200, deadline=None)
def test_it_reads_as_one_tensor(case, data):
    expected, numbers, (rows,) = case
    n = len(expected)
    assert (rows.shape, rows.dtype, rows.device, rows.item_bytes) == (expected.shape, torch.int64, CPU, 16)
    positions = torch.tensor(data.draw(st.lists(st.integers(0, n - 1))) if n else [], dtype=torch.int64)
    assert torch.equal(rows.take(positions), expected[positions])
    assert torch.equal(rows.numbers(positions), numbers[positions])
    if n:
        first = data.draw(st.integers(0, n - 1))
        last = data.draw(st.integers(first + 1, n))
        assert torch.equal(rows.read(first, last), expected[first:last])
        target = torch.full((n + 1, 2), -1)
        assert torch.equal(rows.copy(first, last, target), expected[first:last])
        assert (target[last - first :] == -1).all()


@given(
    case=cases(sources=2),
    n_queries=st.integers(0, 3),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 2000), st.integers(0, 300)),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_chunks_are_all_of_it_in_order(case, n_queries, sizes, data):
    expected, _, sources = case
    start = data.draw(st.integers(0, len(expected)))
    end = data.draw(st.integers(start, len(expected)))
    with pytest.MonkeyPatch.context() as patch:
        for name, size in zip(["_SCORE_ELEMENTS", "_COPY_BYTES", "_TINY_BYTES"], sizes, strict=True):
            patch.setattr(_rows, name, size)
        for first, parts in chunks(sources, n_queries, CPU, range(start, end)):
            assert first == start
            start += len(parts[0])
            assert len(parts[0]) * n_queries <= max(sizes[0], n_queries)
            for part in parts:
                assert torch.equal(part, expected[first:start])
    assert start == end


def test_a_choice_without_items():
    rows = Pieces([items(3), items(2)]).only(torch.tensor([], dtype=torch.int64))
    assert rows.shape == (0, 2)
    assert not list(chunks([rows], 1, CPU))


# What is copied ------------------------------------------------------------------------------------------------------


def owners(rows, tensors, tiny, monkeypatch):
    """Each chunk as its length, and which of the tensors it is a view of."""
    monkeypatch.setattr(_rows, "_TINY_BYTES", tiny)
    memory = {tensor.untyped_storage().data_ptr(): number for number, tensor in enumerate(tensors)}
    lengths_and_owners = []
    for _, (part,) in chunks([rows], 1, CPU):
        lengths_and_owners.append((len(part), memory.get(part.untyped_storage().data_ptr())))
    return lengths_and_owners


def test_what_lies_together_is_a_view(monkeypatch):
    tensors = [items(n) for n in (5, 1, 7)]
    assert owners(Pieces(tensors), tensors, 0, monkeypatch) == [(5, 0), (1, 1), (7, 2)]
    chosen = torch.tensor([1, 2, 3, 5, 6, 7, 9, 12])
    runs = [(3, 0), (1, 1), (2, 2), (1, 2), (1, 2)]
    assert owners(Pieces(tensors).only(chosen), tensors, 0, monkeypatch) == runs


def test_arrays_are_views_too(monkeypatch):
    arrays = [items(n).numpy() for n in (5, 7)]
    arrays[1].flags.writeable = False
    monkeypatch.setattr(_rows, "_TINY_BYTES", 0)
    addresses = [part.data_ptr() for _, (part,) in chunks([Pieces(arrays)], 1, CPU)]
    assert addresses == [array.ctypes.data for array in arrays]


def test_a_mapped_file_is_not_copied_and_outlives_its_array(monkeypatch, tmp_path):
    np.save(tmp_path / "items.npy", items(50).numpy())
    rows = Pieces([np.load(tmp_path / "items.npy", mmap_mode="r")[first : first + 10] for first in range(0, 50, 10)])
    monkeypatch.setattr(_rows, "_TINY_BYTES", 0)
    monkeypatch.setattr(_rows, "_COPY_BYTES", 6 * rows.item_bytes)  # what is mapped comes in chunks of its size
    parts = [part for _, (part,) in chunks([rows], 1, CPU)]
    assert list(map(len, parts)) == [6, 4] * 5
    assert torch.equal(torch.cat(parts), items(50))


def test_tiny_neighbours_are_one_chunk(monkeypatch):
    tensors = [items(n) for n in (1, 2, 1, 20, 1, 3, 20, 30, 1)]
    expected = [(4, None), (20, 3), (4, None), (20, 6), (30, 7), (1, 8)]
    assert owners(Pieces(tensors), tensors, 18 * 16, monkeypatch) == expected
    monkeypatch.setattr(_rows, "_COPY_BYTES", 4 * 3 * 16)  # a quarter of it is copied at a time
    expected = [(3, None), (1, 2), (20, 3), (3, None), (1, 5), (20, 6), (30, 7), (1, 8)]
    assert owners(Pieces(tensors), tensors, 18 * 16, monkeypatch) == expected


def test_a_few_chosen_of_many_pieces_are_one_chunk():
    rows = items(3000)
    chosen = torch.arange(0, 3000, 7)
    ((first, (part,)),) = chunks([Pieces(rows.split(3)).only(chosen)], 1, CPU)
    assert first == 0
    assert torch.equal(part, rows[chosen])


def test_sources_are_cut_where_either_is(monkeypatch):
    monkeypatch.setattr(_rows, "_TINY_BYTES", 0)
    rows = items(9)
    sources = [Pieces(rows.tensor_split([2, 6])), Pieces(rows.tensor_split([4, 6]))]
    assert [first for first, _ in chunks(sources, 1, CPU)] == [0, 2, 4, 6]


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("piece", "got"),
    [
        (torch.ones(2, 3), r"torch.float16 \[n, 3\] on cpu and torch.float32 \[n, 3\] on cpu"),
        (torch.ones(2, 4).half(), r"torch.float16 \[n, 3\] on cpu and torch.float16 \[n, 4\] on cpu"),
        (torch.ones(2, 3, device="meta").half(), r"torch.float16 \[n, 3\] on cpu and torch.float16 \[n, 3\] on meta"),
        (np.ones((2, 3, 1), np.float16), r"torch.float16 \[n, 3\] on cpu and torch.float16 \[n, 3, 1\] on cpu"),
        (torch.tensor(1.0).half(), r"torch.float16 \[n, 3\] on cpu and torch.float16 \[\] on cpu"),
    ],
    ids=["dtype", "width", "device", "axes", "no axis"],
)
def test_pieces_that_differ_are_refused(piece, got):
    message = rf"expected pieces \[n, ...\] of one dtype, shape and device, got {got}: convert them first"
    with pytest.raises(InputError, match=message):
        Pieces([torch.ones(5, 3).half(), piece])


def test_no_piece_is_refused():
    with pytest.raises(InputError, match="expected at least one piece of items, got none; pass an empty tensor of"):
        Pieces([])


@pytest.mark.parametrize(
    ("among", "got"),
    [
        (torch.tensor([1, 2], dtype=torch.int32), r"torch.int32 \[2\]; for a mask: mask.nonzero\(\)\[:, 0\]"),
        (torch.ones(5, dtype=torch.bool), r"torch.bool \[5\]; for a mask"),
        (torch.tensor([[1, 2]]), r"torch.int64 \[1, 2\]"),
        (torch.tensor([2, 1]), r"some out of order or twice: sort them \(among.unique\(\)\)"),
        (torch.tensor([1, 1]), "some out of order or twice"),
        (torch.tensor([-1, 2]), "-1 to 2; positions count the items of all pieces"),
        (torch.tensor([3, 5]), "3 to 5; positions count"),
    ],
    ids=["int32", "mask", "two axes", "order", "twice", "below", "above"],
)
def test_a_choice_that_is_none_is_refused(among, got):
    with pytest.raises(
        InputError, match=rf"expected among as int64 \[n\], ascending, each item once, from 0 to 4, got {got}"
    ):
        Pieces([items(3), items(2)]).only(among)
