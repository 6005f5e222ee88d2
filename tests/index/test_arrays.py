"""Files of arrays: hostile headers, links, pipes, locks."""

from __future__ import annotations

import fcntl
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast.errors import StoreError
from finelip_fast.index import Index, IndexSpec, arrays
from finelip_fast.index.arrays import (
    array_checksums,
    file_checksums,
    locked,
    map_arrays,
    read_contents,
    remove_abandoned,
    remove_unlocked,
    write_arrays,
)

ARRAYS = {"tokens": torch.arange(12.0).half().reshape(2, 2, 3), "scales": torch.ones(2)}
ENTRY = {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}


def file_of(folder: Path, header: Any, data: bytes = bytes(12)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = folder / "file.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_arrays_and_notes_come_back(tmp_path: Path) -> None:
    path = tmp_path / "below" / "file.safetensors"
    write_arrays(path, ARRAYS, {"rows": "abc"})
    contents = read_contents(path)
    assert contents.notes == {"rows": "abc"}
    for name, values in map_arrays(path, contents).items():
        assert torch.equal(values, ARRAYS[name])
    assert file_checksums(path, contents) == array_checksums(ARRAYS)
    assert [path.name for path in path.parent.iterdir()] == ["file.safetensors"]


def test_checksums_are_of_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finelip_fast.index.arrays._PIECE", 7)
    path = tmp_path / "file.safetensors"
    write_arrays(path, ARRAYS)
    contents, content = read_contents(path), path.read_bytes()
    expected = file_checksums(path, contents)
    assert expected == array_checksums(ARRAYS)
    for at in range(min(place.start for place in contents.places.values()), len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert file_checksums(path, contents) != expected


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (ENTRY | {"shape": [10**18, 10**18]}, "that fit"),
        (ENTRY | {"shape": [-2, -3]}, "that fit"),
        (ENTRY | {"shape": [2.0, 3]}, "that fit"),
        (ENTRY | {"shape": [True, 6]}, "that fit"),
        (ENTRY | {"shape": 6}, "that fit"),
        (ENTRY | {"shape": [1] * 100}, "that fit"),
        (ENTRY | {"shape": []}, "that fit"),
        (ENTRY | {"dtype": "F8"}, "that fit"),
        (ENTRY | {"dtype": ["F16"]}, "that fit"),
        (ENTRY | {"data_offsets": [12, 0]}, "that fit"),
        (ENTRY | {"data_offsets": [-12, 0]}, "that fit"),
        (ENTRY | {"data_offsets": [4, 16]}, "expected array at byte"),
        (ENTRY | {"data_offsets": [0]}, "that fit"),
        (ENTRY | {"more": 1}, "that fit"),
        ({"dtype": "F16"}, "that fit"),
        ([], "that fit"),
        (None, "that fit"),
        (ENTRY | {"shape": [2, 2], "data_offsets": [0, 8]}, "bytes, found"),
    ],
    ids=str,
)
def test_an_entry_that_does_not_fit_its_file(tmp_path: Path, entry: Any, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        read_contents(file_of(tmp_path, {"array": entry}))


@pytest.mark.parametrize(
    "header",
    [
        {"a": ENTRY, "b": ENTRY},  # overlapping
        {"array": ENTRY, "__metadata__": {"note": 1}},
        {"array": ENTRY, "__metadata__": []},
        [],
        b"[" * 100_000,
        b'{"array": ' + b'{"a":' * 5_000 + b"1" + b"}" * 5_001,
        b'{"array": {"dtype": "F16", "shape": [1e400], "data_offsets": [0, 12]}}',
        b"\xff" * 20,
        b"",
        b'{"\\ud800": 1}',
    ],
    ids=range(10),
)
def test_a_header_that_is_none(tmp_path: Path, header: Any) -> None:
    with pytest.raises(StoreError, match="expected"):
        read_contents(file_of(tmp_path, header))


@pytest.mark.parametrize("content", [b"", b"1234567", (1 << 62).to_bytes(8, "little"), b"\xff" * 8 + bytes(100)])
def test_a_length_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="expected a header of at most"):
        read_contents(path)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f2', 'fortran_order': False, 'shape': (1000000000000000000, 3, 8), }",
        "{'descr': '<f2', 'fortran_order': False, 'shape': (999999999999, 3, 8), }",
        "{'descr': '<f2', 'fortran_order': True, 'shape': (2, 3, 8), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (2, 3, 8), }",
        "{'descr': '<f2', 'fortran_order': False, 'shape': (2, -3, -8), }",
        "{'descr': '<f2', 'fortran_order': False, 'shape': (48,), }",
        "(" * 10_000,
    ],
)
def test_an_array_in_numpys_format_that_is_none_of_ours(tmp_path: Path, header: str) -> None:
    text = header.encode() + b"\n"
    (tmp_path / "old.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(96))
    with pytest.raises(StoreError, match="expected"):
        read_contents(tmp_path / "old.npy")


def test_links_and_pipes_are_not_read_and_not_written_through(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_arrays(elsewhere / "file.safetensors", ARRAYS)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link.safetensors").symlink_to(elsewhere / "file.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    with pytest.raises(StoreError, match=r"link\.safetensors is a symbolic link, which is not followed"):
        read_contents(folder / "link.safetensors")
    with pytest.raises(StoreError, match="expected a regular file, got a pipe"):
        read_contents(folder / "pipe.safetensors")
    before = (elsewhere / "file.safetensors").read_bytes()
    write_arrays(folder / "link.safetensors", {"other": torch.zeros(1)})
    assert not (folder / "link.safetensors").is_symlink()
    (tmp_path / "linked").symlink_to(elsewhere)
    for write in (lambda path: write_arrays(path / "new", ARRAYS), remove_abandoned):
        with pytest.raises(StoreError, match=re.escape(f"{tmp_path / 'linked'} is a symbolic link")):
            write(tmp_path / "linked")
    assert (elsewhere / "file.safetensors").read_bytes() == before
    assert len(list(elsewhere.iterdir())) == 1


def test_only_what_no_one_is_writing_is_removed(tmp_path: Path) -> None:
    abandoned, locked_path = (tmp_path / f".{letter * 32}.tmp" for letter in "ab")
    abandoned.touch()
    (tmp_path / ".of a person.tmp").touch()
    os.utime(abandoned)
    with locked(locked_path) as file:
        os.utime(locked_path, (0, 0))  # an old time must not matter
        assert remove_abandoned(tmp_path) == 1
        file.write(b"kept")
    assert locked_path.read_bytes() == b"kept"
    assert not abandoned.exists()
    assert remove_abandoned(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == [".of a person.tmp"]
    assert not remove_unlocked(tmp_path / "none")


def test_a_file_that_was_removed_before_it_was_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    flock, removed = fcntl.flock, []

    def late(file: Any, operation: int) -> None:
        if not removed:
            removed.append(path.unlink())
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(path) as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole"


@settings(settings.get_profile("fuzz"))
@given(data=st.data())
def test_any_header_is_read_within_its_file_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    numbers = st.integers(-8, 80) | st.sampled_from([1 << 31, 1 << 63, 1 << 64, 1.5, None, True])
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F16", "F32", "I8", "U8", "I64", "BOOL", None]),
            "shape": st.lists(numbers, max_size=4),
            "data_offsets": st.lists(numbers, min_size=1, max_size=3),
        }
    )
    header = data.draw(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entry | st.none(), max_size=3))
    path = file_of(tmp_path_factory.getbasetemp(), header, bytes(data.draw(st.integers(0, 64))))
    try:
        contents = read_contents(path)
    except StoreError:
        return
    assert sum(values.nbytes for values in map_arrays(path, contents).values()) <= path.stat().st_size


def test_every_mode_of_a_folder_works_on_a_system_without_posix_reads_and_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This simulates Windows, which has neither."""
    for name in ("pread", "preadv", "posix_fadvise"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(arrays, "fcntl", None)
    rows = torch.nn.functional.normalize(torch.randn(20, 3, 8), dim=-1)
    for dtype in ("float16", "int8"):
        folder = tmp_path / dtype
        with Index(IndexSpec("abc", 3, 8, dtype=dtype), folder) as index:
            index.add([str(row) for row in range(20)], rows, [{"n": row} for row in range(20)])
        with Index(IndexSpec("abc", 3, 8, dtype=dtype), folder, verify=True) as index:
            for mode in ("exact", "exact-int8", "two-stage"):
                assert index.search(rows[7:8], 3, mode=mode).items[0][0].id == "7"
            index.delete(["3"])
            index.relabel(["4"], ["new"], [{}])
            assert index.check() == {}
            index.maintain()
            index.snapshot(tmp_path / f"{dtype} copy")
            assert len(index.embeddings) == len(index) == 19
