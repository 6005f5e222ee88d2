"""Lists beside segments: they are read as written, damage is reported, and upkeep ignores one that is being written."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from finelip_fast.errors import StoreError
from finelip_fast.index.arrays import remove_abandoned, write_arrays
from finelip_fast.index.lists import Listed, list_path, read_list, write_list

SPEC = {"version": 3, "checkpoint": "abc"}
ROWS = [("a b", 1, '{"of": "a"}'), ("b\udcff\n", None, "{}")]


def test_a_list_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_list(tmp_path, "x.safetensors", SPEC, ROWS)
    listed = read_list(tmp_path, "x.safetensors")
    assert listed == Listed(SPEC, 3, ["a b", "b\udcff\n"], [1, None], ['{"of": "a"}', "{}"])


@pytest.mark.parametrize("at", [0, 20, -2])
def test_a_damaged_list_is_told(tmp_path: Path, at: int) -> None:
    write_list(tmp_path, "x.safetensors", SPEC, ROWS)
    path = list_path(tmp_path, "x.safetensors")
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"x\.items: expected "):
        read_list(tmp_path, "x.safetensors")


def test_what_is_being_written_is_not_taken_for_abandoned(tmp_path: Path) -> None:
    stop = threading.Event()

    def sweep() -> None:
        while not stop.is_set():
            remove_abandoned(tmp_path)

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for _ in range(300):
            write_list(tmp_path, "x.safetensors", SPEC, ROWS)
            write_arrays(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    finally:
        stop.set()
        sweeper.join()
    assert {path.name for path in tmp_path.iterdir()} == {"x.items", "x.safetensors"}
