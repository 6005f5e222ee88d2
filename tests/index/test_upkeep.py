"""Looking after a folder: order, older versions, copies, and what is damaged."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finelip_fast._errors import InputError, StoreError
from finelip_fast.index import Index, IndexSpec, stored_index, upkeep
from finelip_fast.index.catalogue import Catalogue, Layout

SPEC = IndexSpec(checkpoint="abc", tokens=3, width=8)


def embeddings(rows: int, seed: int = 0) -> Tensor:
    rows = torch.randn(rows, SPEC.tokens, SPEC.width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1).half().float()


def add(index: Index, *ids: str, seed: int = 0) -> None:
    index.add(ids, embeddings(len(ids), seed), [{"of": one} for one in ids])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "index"


def contents(folder: Path) -> list[str]:
    with closing(Index(SPEC, folder)) as index:
        return index.ids


def test_older_versions_can_be_opened_until_the_folder_is_put_in_order(folder: Path) -> None:
    with closing(Index(SPEC, folder)) as index:
        add(index, "a", "b")
        index.delete(["a"])
        assert index.version == 2
        with closing(Index(SPEC, folder, version=1)) as old:
            assert old.ids == ["a", "b"]
            for change in (lambda: add(old, "x"), lambda: old.delete(["a"]), old.maintain):
                with pytest.raises(StoreError, match="open at an older version"):
                    change()
        index.maintain()
        assert contents(folder) == ["b"]
    with pytest.raises(StoreError, match=r"expected a version of .* from 3 to 3, got 1"):
        Index(SPEC, folder, version=1)
    with pytest.raises(InputError, match="expected version only with a folder"):
        Index(SPEC, version=0)


def test_putting_in_order_leaves_one_segment_and_what_nothing_names(folder: Path) -> None:
    with closing(Index(SPEC, folder)) as index:
        for number in range(4):
            add(index, f"item {number}", seed=number)
        index.delete(["item 1"])
        stray = folder / "segments" / "stray.safetensors"
        stray.write_bytes(b"of a writer that was killed, or of a change whose record was lost")
        index.search(embeddings(1), 1, mode="exact-int8")
        assert len(list((folder / "cache").iterdir())) == 4
        before = index.embeddings.clone()
        report = index.maintain()
        assert (report["segments"], report["after"], report["strays"]) == (4, 1, 1)
        assert report["bytes"] > 0
        assert len(list((folder / "segments").iterdir())) == 2
        assert list((folder / "cache").iterdir()) == []
        assert index.maintain() == {"segments": 1, "after": 1, "strays": 1, "bytes": 0}
        assert stray.exists()
        add(index, "later", seed=9)
    with closing(Index(SPEC, folder)) as index:
        assert index.ids == ["item 0", "item 2", "item 3", "later"]
        assert torch.equal(index.embeddings[:3], before)
        assert index.check() == {}


def test_an_empty_folder_can_be_put_in_order(folder: Path) -> None:
    with closing(Index(SPEC, folder)) as index:
        assert index.maintain() == {"segments": 0, "after": 0, "strays": 0, "bytes": 0}
        add(index, "a")
        index.delete(["a"])
        assert index.maintain()["segments"] == 1
    assert list((folder / "segments").iterdir()) == []
    assert contents(folder) == []


def test_opening_while_another_puts_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The segments that the catalogue named are gone when they are to be opened."""
    with closing(Index(SPEC, folder)) as writer:
        add(writer, "a")
        add(writer, "b", seed=1)
        layout, calls = Catalogue.layout, []

        def late(catalogue: Catalogue, version: int | None = None) -> Layout:
            found = layout(catalogue, version)
            if catalogue is not writer.catalogue:
                calls.append(found.version)
                if len(calls) == 1:
                    writer.maintain()
            return found

        monkeypatch.setattr(Catalogue, "layout", late)
        with closing(Index(SPEC, folder)) as reader:
            assert reader.ids == ["a", "b"]
        assert calls[0] == 2
        assert set(calls[1:]) == {3}


def test_full_segments_are_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "_FULL", 4 * 70)  # bytes: four items
    with closing(Index(SPEC, folder)) as index:
        for number, size in enumerate([3, 1, 1, 1, 4, 2, 1]):
            add(index, *(f"{number}-{one}" for one in range(size)), seed=number)
        before, names = (index.ids, index.embeddings), [row.name for row in index.view().layout.segments]
        assert index.maintain()["after"] == 4
        rows = index.view().layout.segments
        assert [row.rows for row in rows] == [3, 3, 4, 3]
        assert (rows[0].name, rows[2].name) == (names[0], names[4])
        assert index.ids == before[0]
        assert torch.equal(index.embeddings, before[1])
        index.delete(["4-1"])
        assert index.maintain()["after"] == 4
        assert [row.rows for row in index.view().layout.segments] == [3, 3, 3, 3]
        assert index.check() == {}


def test_a_snapshot_is_the_index_with_its_versions(folder: Path, tmp_path: Path) -> None:
    with closing(Index(SPEC, folder)) as index:
        add(index, "a", "b")
        index.delete(["a"])
        index.snapshot(tmp_path / "copies" / "one")
        add(index, "later", seed=1)  # what comes after is not in it
        with pytest.raises(StoreError, match="expected a new or empty folder"):
            index.snapshot(tmp_path / "copies" / "one")
    with closing(Index(SPEC, tmp_path / "copies" / "one")) as copy:
        assert (copy.ids, copy.version, copy.check()) == (["b"], 2, {})
        assert torch.equal(copy.embeddings, embeddings(2).half()[1:])
        add(copy, "own", seed=2)
    with closing(Index(SPEC, tmp_path / "copies" / "one", version=1)) as old:
        assert old.ids == ["a", "b"]
    assert contents(folder) == ["b", "later"]
    with pytest.raises(InputError, match="got one in memory"):
        Index(SPEC).snapshot(tmp_path / "memory")
    (tmp_path / "file").touch()
    with closing(Index(SPEC, folder)) as index, pytest.raises(StoreError, match="cannot write the snapshot"):
        index.snapshot(tmp_path / "file" / "below")


def test_a_flipped_bit_is_found(folder: Path) -> None:
    with closing(Index(SPEC, folder)) as index:
        add(index, "a", "b")
        add(index, "c", seed=1)
        assert index.check() == {}
        first, second = sorted((folder / "segments").iterdir(), key=lambda path: -path.stat().st_size)
        content = bytearray(first.read_bytes())
        content[-1] ^= 1
        first.write_bytes(content)
        assert index.check() == {"b": f"row 1 of segment {first.name} is not what was written"}
        add(index, "d", seed=2)
        with pytest.raises(StoreError, match=r"1 items are damaged, 'b' among them"):  # a new checksum would hide it
            index.maintain()
        assert set(index.check()) == {"b"}
        second.unlink()
        damaged = index.check()
        assert set(damaged) == {"b", "c"}
        assert "No such file" in damaged["c"]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_is_not_damaged_can_be_searched_and_kept(folder: Path, dtype: str) -> None:
    spec = replace(SPEC, dtype=dtype)
    with closing(Index(spec, folder)) as index:
        for number, names in enumerate(["ab", "cd", "ef", "gh"]):
            add(index, *names, seed=number)
        index.delete(["c"])
        segments = [folder / "segments" / row.name for row in index.view().layout.segments]
    segments[0].unlink()
    segments[1].write_bytes(segments[1].read_bytes()[:300])
    content = bytearray(segments[2].read_bytes())
    content[-1] ^= 1
    segments[2].write_bytes(content)
    with pytest.raises(StoreError, match=r"is missing: restore it, or keep the rest with finelip index repair"):
        stored_index(folder)
    with closing(stored_index(folder, skip_damaged=True)) as index:
        assert set(index.damaged) == {segments[0].name, segments[1].name}
        assert index.ids == ["e", "f", "g", "h"]
        found = index.search(embeddings(2, seed=3), 1)
        assert [[item.id for item in items] for items in found.items] == [["g"], ["h"]]
        damaged = index.check()
        assert set(damaged) == {"a", "b", "d", "f"}
        with pytest.raises(StoreError, match="4 items are damaged"):
            index.maintain()
        assert index.repair() == damaged
        assert index.repair() == index.check() == {}
        assert index.ids == ["e", "g", "h"]
    with closing(Index(spec, folder)) as index:
        add(index, "a", "b")
        assert index.ids == ["e", "g", "h", "a", "b"]
        assert index.check() == {}
