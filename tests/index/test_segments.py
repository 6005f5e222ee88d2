"""Segments: written once, read back bit for bit, and refused by name if they differ from what was written."""

from __future__ import annotations

import os
import re
import resource
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from finelip_fast.errors import StoreError
from finelip_fast.index.arrays import UnavailableError
from finelip_fast.index.segments import Segment, encode, joined, open_segment, write_segment
from finelip_fast.kernels import QuantizedItems, quantize, quantize_items


def random(rows: int, *, seed: int = 0) -> torch.Tensor:
    values = torch.randn(rows, 3, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


def new_segment(folder: Path, embeddings: torch.Tensor, dtype: str = "float16") -> tuple[Segment, list[int]]:
    name, crcs = write_segment(folder, encode(embeddings, dtype))
    return reopened(folder, name, len(embeddings), dtype), crcs


def read(segment: Segment, rows: torch.Tensor) -> torch.Tensor:
    target = torch.empty(len(rows), 3, 8, dtype=segment.dtype)
    with ExitStack() as resources:
        segment.reading(rows, target, resources)()
    return target


def reopened(folder: Path, name: str, rows: int, dtype: str = "float16") -> Segment:
    return open_segment(folder, name, rows=rows, shape=(3, 8), dtype=dtype)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_segment_comes_back_as_float16(tmp_path: Path, rows: int, dtype: torch.dtype) -> None:
    embeddings = random(rows).to(dtype)
    segment, _ = new_segment(tmp_path, embeddings)
    assert segment.embeddings(slice(None)).dtype == torch.float16
    assert torch.equal(segment.embeddings(slice(None)), embeddings.half())
    order = torch.arange(rows).flip(0)
    assert torch.equal(read(segment, order), embeddings.half().flip(0))


def test_a_segment_in_int8_is_its_integers_with_the_global_rows_as_they_were(tmp_path: Path) -> None:
    embeddings = random(5)
    segment, _ = new_segment(tmp_path, embeddings, "int8")
    values, scales = quantize(embeddings)
    expected = values * scales[..., None]
    expected[:, :1] = embeddings[:, :1].half()
    rows = torch.tensor([4, 0, 2])
    assert torch.equal(read(segment, rows), expected[rows])
    assert torch.equal(segment.embeddings(slice(1, 3)), expected[1:3])
    assert torch.equal(segment.embeddings(rows), expected[rows])


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the system does not say what it has in memory")
@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("cached", [True, False])
def test_many_rows_are_read_from_the_disk_only_if_they_are_not_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool, dtype: str
) -> None:
    segment, _ = new_segment(tmp_path, random(1000), dtype)
    rows = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:700]
    preadv, from_disk = os.preadv, []

    def watched(descriptor, buffers, offset, flags=0):
        if not flags:
            from_disk.append(offset)
        elif not cached:
            raise BlockingIOError
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", watched)
    assert torch.equal(read(segment, rows), segment.embeddings(rows))
    assert bool(from_disk) != cached


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_global_embeddings_lie_side_by_side(tmp_path: Path, dtype: str) -> None:
    segment, _ = new_segment(tmp_path, random(5), dtype)
    values, scales = quantize(read(segment, torch.arange(5))[:, :1])
    assert torch.equal(segment.arrays["globals"], values[:, 0])
    assert torch.equal(segment.arrays["global_scales"], scales[:, 0])


def test_checksums_are_of_the_rows_as_they_lie_in_the_file(tmp_path: Path) -> None:
    embeddings = random(3).half()
    segment, crcs = new_segment(tmp_path, embeddings)
    content = (tmp_path / segment.name).read_bytes()
    at = content.index(embeddings.numpy().tobytes())
    assert at % 64 == 0
    assert crcs == [zlib.crc32(content[at + row * 48 : at + (row + 1) * 48]) for row in range(3)]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_any_flipped_byte_is_found(tmp_path: Path, dtype: str) -> None:
    segment, crcs = new_segment(tmp_path, random(4), dtype)
    assert segment.damaged(crcs) == {}
    assert segment.damaged([None] * 4) == {}  # as before checksums existed
    content = (tmp_path / segment.name).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for at in range(start, len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 4
        (tmp_path / "flipped.safetensors").write_bytes(flipped)
        assert len(reopened(tmp_path, "flipped.safetensors", 4, dtype).damaged(crcs)) == 1, at


def test_chosen_rows_of_segments_are_joined_to_the_bit(tmp_path: Path) -> None:
    for dtype in ("float16", "int8"):
        (first, first_crcs), (second, second_crcs) = (new_segment(tmp_path, random(3, seed=n), dtype) for n in range(2))
        arrays = joined(
            [(first, torch.tensor([0, 2])), (second, torch.tensor([], dtype=torch.int64)), (second, torch.tensor([1]))]
        )
        name, new = write_segment(tmp_path, arrays)
        assert new == [first_crcs[0], first_crcs[2], second_crcs[1]]
        assert reopened(tmp_path, name, 3, dtype).damaged(new) == {}


def test_a_transposed_tensor_is_written_in_its_own_order(tmp_path: Path) -> None:
    embeddings = random(2).transpose(1, 2).contiguous().transpose(1, 2)
    assert not embeddings.is_contiguous()
    assert torch.equal(new_segment(tmp_path, embeddings)[0].embeddings(slice(None)), embeddings.half())


def test_no_segment_replaces_another(tmp_path: Path) -> None:
    names = {new_segment(tmp_path, random(1))[0].name for _ in range(3)}
    assert len(names) == len(list(tmp_path.iterdir())) == 3


def test_int8_copies_are_kept_and_made_again_where_they_are_spoilt(tmp_path: Path) -> None:
    embeddings = random(5)
    segment, _ = new_segment(tmp_path / "segments", embeddings)
    expected = quantize_items(embeddings.half())
    cache = tmp_path / "cache"
    assert not segment.is_quantized(cache)
    for _ in range(2):
        for mine, right in zip(segment.quantized(cache), expected, strict=True):
            assert torch.equal(mine, right)
        assert segment.is_quantized(cache)
        (file,) = cache.iterdir()
        file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(segment.quantized(None).values, expected.values)
    int8_segment = new_segment(tmp_path / "segments", embeddings, "int8")[0]
    assert int8_segment.is_quantized(None)
    assert isinstance(int8_segment.quantized(None), QuantizedItems)


@pytest.mark.parametrize("kind", ["a flipped byte", "of other embeddings", "of another time", "a link"])
def test_int8_copies_that_are_not_of_the_embeddings_are_made_anew(tmp_path: Path, kind: str) -> None:
    segment, _ = new_segment(tmp_path / "segments", random(5))
    other_segment, _ = new_segment(tmp_path / "segments", random(5, seed=1))
    cache = tmp_path / "cache"
    expected = QuantizedItems(*(values.clone() for values in segment.quantized(cache)))
    path = cache / segment.name
    content = path.read_bytes()
    damaged = []
    if kind == "a flipped byte":
        damaged = [content[:at] + bytes([content[at] ^ 8]) + content[at + 1 :] for at in range(0, len(content), 3)]
    elif kind == "of other embeddings":
        other_segment.quantized(cache)
        damaged = [(cache / other_segment.name).read_bytes()]
    elif kind == "of another time":  # as before checksums existed
        save_file(expected._asdict(), path)
        damaged = [path.read_bytes()]
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        assert not segment.is_quantized(cache)
    for damaged_content in damaged:
        path.write_bytes(damaged_content)
        for mine, right in zip(
            reopened(tmp_path / "segments", segment.name, 5).quantized(cache), expected, strict=True
        ):
            assert torch.equal(mine, right)
    for mine, right in zip(segment.quantized(cache), expected, strict=True):
        assert torch.equal(mine, right)
    assert segment.is_quantized(cache)


def test_int8_copies_of_damaged_embeddings_are_not_kept(tmp_path: Path) -> None:
    segment, _ = new_segment(tmp_path / "segments", random(5))
    path = tmp_path / "segments" / segment.name
    content = path.read_bytes()
    path.write_bytes(content.replace(random(5)[0, 1].half().numpy().tobytes(), bytes(16)))
    reopened(tmp_path / "segments", segment.name, 5).quantized(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    path.write_bytes(content)
    copies = reopened(tmp_path / "segments", segment.name, 5).quantized(tmp_path / "cache")
    assert torch.equal(copies.values, quantize_items(random(5).half()).values)


def test_where_int8_copies_cannot_be_kept_they_are_made_in_memory(tmp_path: Path) -> None:
    segment, _ = new_segment(tmp_path / "segments", random(5))
    expected = quantize_items(random(5).half())
    (tmp_path / "file").touch()
    (tmp_path / "linked").symlink_to(tmp_path / "segments")
    for cache in (tmp_path / "file", tmp_path / "linked", tmp_path / "none" / "below"):
        assert torch.equal(segment.quantized(cache).values, expected.values)
    assert len(list((tmp_path / "segments").iterdir())) == 1


def test_two_processes_make_int8_copies_at_once(tmp_path: Path) -> None:
    segment, _ = new_segment(tmp_path / "segments", random(5))
    segments = [reopened(tmp_path / "segments", segment.name, 5) for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        copies = list(pool.map(lambda segment: segment.quantized(tmp_path / "cache"), segments))
    assert all(torch.equal(copy.values, copies[0].values) for copy in copies)
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("name", ["../../escaped.conf", "/etc/passwd", "..", "", "a/b", "a\0b", "x" * 300, None, 7])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="expected a file name without a folder"):
        reopened(tmp_path / "segments", name, 1)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    segment, _ = new_segment(tmp_path / "elsewhere", random(2))
    (tmp_path / "segments").mkdir()
    (tmp_path / "segments" / "link.safetensors").symlink_to(tmp_path / "elsewhere" / segment.name)
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="is a symbolic link, which is not followed"):
        reopened(tmp_path / "segments", "link.safetensors", 2)
    with pytest.raises(StoreError, match="is a symbolic link; replace it with the folder"):
        reopened(tmp_path / "linked", segment.name, 2)


def test_rows_that_are_not_finite_are_found(tmp_path: Path) -> None:
    for dtype, row in (("float16", 2), ("int8", 0)):
        embeddings = random(3)
        embeddings[1, row, 3] = torch.inf
        segment, crcs = new_segment(tmp_path, embeddings, dtype)
        assert segment.damaged(crcs) == {1: "holds numbers that are not finite"}


def test_where_no_more_files_can_be_opened_what_is_mapped_is_read(tmp_path: Path) -> None:
    for dtype in ("float16", "int8"):
        segment, _ = new_segment(tmp_path, random(4), dtype)
        rows = torch.tensor([3, 1])
        expected = read(segment, rows)
        held = []
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        try:
            with suppress(OSError):
                while True:
                    held.append(os.open("/dev/null", os.O_RDONLY))
            actual = read(segment, rows)
            with pytest.raises(UnavailableError, match=r"Too many open files; allow the process more open files"):
                reopened(tmp_path, segment.name, 4, dtype)
        finally:
            for descriptor in held:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert torch.equal(actual, expected)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=f"cannot write {re.escape(str(tmp_path / 'file'))}.*"):
        new_segment(tmp_path / "file", random(1))


@pytest.mark.parametrize("keep", [0, 20, 400], ids=["empty", "in the header", "in the values"])
def test_a_truncated_segment_is_named(tmp_path: Path, keep: int) -> None:
    segment, _ = new_segment(tmp_path, random(4))
    path = tmp_path / segment.name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoreError, match=f"{segment.name} cannot be read.*restore it, or run finelip index repair"):
        reopened(tmp_path, segment.name, 4)


def test_a_segment_that_has_become_shorter_or_is_gone_is_not_read(tmp_path: Path) -> None:
    segment, _ = new_segment(tmp_path, random(4))
    path = tmp_path / segment.name
    read(segment, torch.tensor([0]))
    path.write_bytes(path.read_bytes()[:400])
    for use in (
        lambda: read(segment, torch.tensor([0, 3])),
        segment.refuse_shortened,
        lambda: segment.damaged([None] * 4),
    ):
        with pytest.raises(StoreError, match="has changed in size"):
            use()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read(segment, torch.tensor([0]))
    with pytest.raises(FileNotFoundError):
        reopened(tmp_path, segment.name, 4)


def test_a_segment_of_numpys_format_is_read(tmp_path: Path) -> None:
    embeddings = random(4).half()
    np.save(tmp_path / "old.npy", embeddings.numpy())
    segment = reopened(tmp_path, "old.npy", 4)
    assert torch.equal(segment.embeddings(slice(None)), embeddings)
    assert torch.equal(read(segment, torch.tensor([3, 1])), embeddings[[3, 1]])
    assert not segment.is_current
    expected = quantize(embeddings[:, :1])[0][:, 0]
    assert torch.equal(segment.arrays["globals"], expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 3, 8), np.float32), r"expected tokens float16 \[2, 3, 8\], got float32 \[2, 3, 8\]"),
        (np.zeros((1, 3, 8), np.float16), r"expected tokens float16 \[2, 3, 8\], got float16 \[1, 3, 8\]"),
        (np.zeros((2, 8, 3), np.float16), r"expected tokens float16 \[2, 3, 8\], got float16 \[2, 8, 3\]"),
        (np.array([{"any": "object"}], object), "cannot be read"),  # a pickle, which must not be loaded
    ],
    ids=["dtype", "rows", "shape", "pickle"],
)
def test_a_foreign_file_is_refused(tmp_path: Path, values: np.ndarray, message: str) -> None:
    np.save(tmp_path / "segment.npy", values)
    with pytest.raises(StoreError, match=f"segment.npy.*{message}"):
        reopened(tmp_path, "segment.npy", 2)


def test_a_segment_of_another_dtype_is_refused(tmp_path: Path) -> None:
    segment, _ = new_segment(tmp_path, random(2))
    with pytest.raises(StoreError, match=r"expected values int8 \[2, 3, 8\], got none"):
        reopened(tmp_path, segment.name, 2, "int8")
