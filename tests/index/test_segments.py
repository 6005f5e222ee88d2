"""Segments: written once, read back bit for bit, and refused by name when they are not what was written."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from finelip_fast._errors import StoreError
from finelip_fast.index.segments import checksums, read_segment, write_segment


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_segment_comes_back_as_float16(tmp_path: Path, rows: int, dtype: torch.dtype) -> None:
    embeddings = torch.randn(rows, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    name, _ = write_segment(tmp_path, embeddings)
    back = read_segment(tmp_path, name, rows=rows, shape=(3, 4))
    assert back.dtype == torch.float16
    assert torch.equal(back, embeddings.half())


def test_checksums_are_of_the_rows_as_they_lie_in_the_file(tmp_path: Path) -> None:
    embeddings = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    name, crcs = write_segment(tmp_path, embeddings)
    content = (tmp_path / name).read_bytes()[-3 * 4 * 5 * 2 :]
    assert crcs == [zlib.crc32(content[row * 40 : (row + 1) * 40]) for row in range(3)]
    assert checksums(read_segment(tmp_path, name, rows=3, shape=(4, 5))) == crcs


def test_a_transposed_tensor_is_written_in_its_own_order(tmp_path: Path) -> None:
    embeddings = torch.arange(24.0).view(2, 4, 3).transpose(1, 2)
    assert not embeddings.is_contiguous()
    name, _ = write_segment(tmp_path, embeddings)
    assert torch.equal(read_segment(tmp_path, name, rows=2, shape=(3, 4)), embeddings.half())


def test_no_segment_replaces_another(tmp_path: Path) -> None:
    names = {write_segment(tmp_path, torch.full((1, 1, 1), value))[0] for value in (1.0, 2.0, 3.0)}
    assert {read_segment(tmp_path, name, rows=1, shape=(1, 1)).item() for name in names} == {1.0, 2.0, 3.0}


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"cannot write {re.escape(str(tmp_path / 'gone'))}.*No such file"):
        write_segment(tmp_path / "gone", torch.zeros(1, 1, 1))


@pytest.mark.parametrize("keep", [0, 20, 130], ids=["empty", "in the header", "in the values"])
def test_a_truncated_segment_is_named(tmp_path: Path, keep: int) -> None:
    name, _ = write_segment(tmp_path, torch.zeros(4, 3, 8))
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoreError, match=f"{name} cannot be read.*restore it or index again"):
        read_segment(tmp_path, name, rows=4, shape=(3, 8))


def test_a_missing_segment_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"lost\.npy cannot be read.*No such file"):
        read_segment(tmp_path, "lost.npy", rows=1, shape=(1, 1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 3, 4), np.float32), r"expected float16 \[2, 3, 4\] or more, got float32 \[2, 3, 4\]"),
        (np.zeros((1, 3, 4), np.float16), r"expected float16 \[2, 3, 4\] or more, got float16 \[1, 3, 4\]"),
        (np.zeros((2, 4, 3), np.float16), r"expected float16 \[2, 3, 4\] or more, got float16 \[2, 4, 3\]"),
        (np.array([{"any": "object"}], object), "cannot be read"),  # a pickle, which is not opened
    ],
    ids=["dtype", "rows", "shape", "pickle"],
)
def test_a_foreign_file_is_refused(tmp_path: Path, values: np.ndarray, message: str) -> None:
    np.save(tmp_path / "segment.npy", values)
    with pytest.raises(StoreError, match=f"segment.npy.*{message}"):
        read_segment(tmp_path, "segment.npy", rows=2, shape=(3, 4))
