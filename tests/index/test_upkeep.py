"""Maintenance of a folder: compaction, older versions, copies, and damage."""

from __future__ import annotations

import json
import os
import resource
import sqlite3
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from finelip_fast.errors import InputError, StoreError
from finelip_fast.index import Index, IndexSpec, stored_index, upkeep
from finelip_fast.index.arrays import locked
from finelip_fast.index.catalogue import Catalogue, Layout, SegmentRow
from finelip_fast.index.segments import Segment

SPEC = IndexSpec(checkpoint="abc", tokens=3, width=8)


def embeddings(rows: int, seed: int = 0) -> Tensor:
    rows = torch.randn(rows, SPEC.tokens, SPEC.width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1).half().float()


def add(index: Index, *ids: str, seed: int = 0) -> None:
    index.add(ids, embeddings(len(ids), seed), [{"of": item} for item in ids])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "index"


def maintained(before: int, after: int, unreferenced: int, freed: int = 0) -> dict[str, int]:
    segments = {"segments_before": before, "segments_after": after, "unreferenced_segments": unreferenced}
    return {**segments, "bytes_freed": freed}


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
                with pytest.raises(StoreError, match="open at version 1, read-only"):
                    change()
        index.maintain()
        assert contents(folder) == ["b"]
    with pytest.raises(StoreError, match=r"expected version from 3 to 3 of .*, got 1"):
        Index(SPEC, folder, version=1)
    with pytest.raises(InputError, match="version=0 needs a folder"):
        Index(SPEC, version=0)


def test_items_that_come_one_by_one_stay_in_few_segments(folder: Path) -> None:
    """A large segment with a gap beside them is not rewritten, and an index opened meanwhile sees the items, too."""
    with closing(Index(SPEC, folder)) as index, closing(Index(SPEC, folder)) as reader:
        index.add([f"old {n}" for n in range(1_000)], embeddings(1_000, 7), [{}] * 1_000)
        index.delete(["old 3", "old 500"])
        large = {path.name for path in (folder / "segments").glob("*.safetensors")}
        expected = {f"old {n}": row for n, row in enumerate(embeddings(1_000, 7)) if n not in (3, 500)}
        for number in range(300):
            add(index, f"new {number}", seed=number)
            expected[f"new {number}"] = embeddings(1, number)[0]
            if number % 3 == 0:
                index.delete([item := f"new {number // 2}"])
                del expected[item]
            index.compact_recent()
        files = {path.name for path in (folder / "segments").glob("*.safetensors")}
        assert len(files) < 80
        assert large < files
        for opened in (index, reader):
            assert opened.ids == list(expected)
            assert torch.equal(opened.embeddings, torch.stack(list(expected.values())).half())
            assert opened.search(embeddings(1, 299), 1).items[0][0].id == "new 299"
        assert index.check() == {}
        with pytest.raises(StoreError, match="expected version from"):
            Index(SPEC, folder, version=1)


def test_few_small_segments_are_left_alone_and_their_versions_too(folder: Path) -> None:
    with closing(Index(SPEC, folder)) as index:
        for number in range(20):
            add(index, f"item {number}", seed=number)
            index.compact_recent()
        assert len(list((folder / "segments").glob("*.safetensors"))) == 20
        with closing(Index(SPEC, folder, version=5)) as old:
            assert len(old) == 5
    with closing(Index(SPEC)) as index:  # in memory
        add(index, "a")
        index.compact_recent()
        assert index.ids == ["a"]


def test_many_small_additions_are_warned_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "_WARNED_OF", 70)
    with closing(Index(SPEC, folder)) as index:
        for number in range(69):
            add(index, f"item {number}")
        with pytest.warns(UserWarning, match=r"has 70 segments.* finelip index maintain --index"):
            add(index, "the last")
        index.compact_recent()
        add(index, "another")
        assert len(index) == 71


def test_damaged_items_are_not_written_again_with_a_new_checksum(folder: Path) -> None:
    with closing(Index(SPEC, folder)) as index:
        for number in range(64):
            add(index, f"item {number}", seed=number)
        path = next((folder / "segments").glob("*.safetensors"))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        damaged = index.check()
        index.compact_recent()
        assert index.check() == damaged != {}
        assert len(index) == 64


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
        assert report == maintained(4, 1, 1, report["bytes_freed"])
        assert report["bytes_freed"] > 0
        assert len(list((folder / "segments").glob("*.safetensors"))) == 2
        assert list((folder / "cache").iterdir()) == []
        assert index.maintain() == maintained(1, 1, 1)
        assert stray.exists()
        add(index, "later", seed=9)
    with closing(Index(SPEC, folder)) as index:
        assert index.ids == ["item 0", "item 2", "item 3", "later"]
        assert torch.equal(index.embeddings[:3], before)
        assert index.check() == {}


def test_an_empty_folder_can_be_put_in_order(folder: Path) -> None:
    with closing(Index(SPEC, folder)) as index:
        assert index.maintain() == maintained(0, 0, 0)
        add(index, "a")
        index.delete(["a"])
        assert index.maintain()["segments_before"] == 1
    assert list((folder / "segments").glob("*.safetensors")) == []
    assert contents(folder) == []


def test_opening_while_another_puts_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The segments named by the catalogue are gone before they are opened."""
    with closing(Index(SPEC, folder)) as writer:
        add(writer, "a")
        add(writer, "b", seed=1)
        layout, calls = Catalogue.layout, []

        def late(catalogue: Catalogue, version: int | None = None) -> Layout:
            current_layout = layout(catalogue, version)
            if catalogue is not writer._store.catalogue:
                calls.append(current_layout.version)
                if len(calls) == 1:
                    writer.maintain()
            return current_layout

        monkeypatch.setattr(Catalogue, "layout", late)
        with closing(Index(SPEC, folder)) as reader:
            assert reader.ids == ["a", "b"]
        assert calls[0] == 2
        assert set(calls[1:]) == {3}


def test_full_segments_are_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "_FULL", 4 * 70)  # bytes: four items
    with closing(Index(SPEC, folder)) as index:
        for number, size in enumerate([3, 1, 1, 1, 4, 2, 1]):
            add(index, *(f"{number}-{position}" for position in range(size)), seed=number)
        before, names = (index.ids, index.embeddings), [row.name for row in index._store.view().layout.segments]
        assert index.maintain()["segments_after"] == 4
        rows = index._store.view().layout.segments
        assert [row.rows for row in rows] == [3, 3, 4, 3]
        assert (rows[0].name, rows[2].name) == (names[0], names[4])
        assert index.ids == before[0]
        assert torch.equal(index.embeddings, before[1])
        index.delete(["4-1"])
        assert index.maintain()["segments_after"] == 4
        assert [row.rows for row in index._store.view().layout.segments] == [3, 3, 3, 3]
        assert index.check() == {}


def test_a_snapshot_is_the_index_with_its_versions(folder: Path, tmp_path: Path) -> None:
    with closing(Index(SPEC, folder)) as index:
        add(index, "a", "b")
        index.delete(["a"])
        index.snapshot(tmp_path / "copies" / "one")
        add(index, "later", seed=1)  # later changes are not included
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
        first, second = sorted((folder / "segments").glob("*.safetensors"), key=lambda path: -path.stat().st_size)
        content = bytearray(first.read_bytes())
        content[-1] ^= 1
        first.write_bytes(content)
        assert index.check() == {"b": f"row 1 of segment {first.name} is not what was written"}
        add(index, "d", seed=2)
        with pytest.raises(StoreError, match=r"1 items are damaged, such as 'b'"):  # a new checksum would hide it
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
        segments = [folder / "segments" / row.name for row in index._store.view().layout.segments]
    segments[0].unlink()
    segments[1].write_bytes(segments[1].read_bytes()[:300])
    content = bytearray(segments[2].read_bytes())
    content[-1] ^= 1
    segments[2].write_bytes(content)
    with pytest.raises(StoreError, match=r"is missing; restore it, or keep the rest with finelip index repair"):
        stored_index(folder)
    with closing(stored_index(folder, skip_damaged=True)) as index:
        assert set(index.damaged) == {segments[0].name, segments[1].name}
        assert index.ids == ["e", "f", "g", "h"]
        results = index.search(embeddings(2, seed=3), 1)
        assert [[item.id for item in items] for items in results.items] == [["g"], ["h"]]
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


def test_any_damaged_row_that_is_found_is_named(folder: Path) -> None:
    with closing(Index(SPEC, folder)) as index:
        add(index, "a", "b", "c")
        (row,) = index._store.view().layout.segments
        path = folder / "segments" / row.name
        content = path.read_bytes()
        at = content.index(index.embeddings[1].numpy().tobytes())
        path.write_bytes(content[: at + 48 + 3] + bytes([content[at + 48 + 3] ^ 1]) + content[at + 48 + 4 :])
    with closing(Index(SPEC, folder)) as index:
        for mode in ("exact", "exact-int8", "two-stage"):
            with pytest.raises(StoreError, match=r"item 'c' is damaged: row 2 of segment .* finelip index repair"):
                index.search(embeddings(1), 3, mode=mode)
    with pytest.raises(StoreError, match=r"item 'c' is damaged: row 2 of segment .* is not what was written; restore"):
        Index(SPEC, folder, verify=True)
    with pytest.raises(InputError, match="expected either verify or skip_damaged, got both"):
        Index(SPEC, folder, verify=True, skip_damaged=True)
    path.write_bytes(content)
    with closing(Index(SPEC, folder, verify=True)) as index:
        assert index.check() == {}


def test_a_check_goes_on_when_another_compacts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Index(SPEC, folder)) as index, closing(Index(SPEC, folder)) as second_index:
        for number in range(3):
            add(index, f"old {number}", f"new {number}", seed=number)
        original_open, compacted = index._store.open_segment, []

        def open_segment(row: SegmentRow) -> Segment:
            if not compacted:
                second_index.delete(["old 0", "old 2"])
                compacted.append(second_index.maintain())
            return original_open(row)

        monkeypatch.setattr(index._store, "open_segment", open_segment)
        assert index.check() == {}
        assert compacted
        assert index.ids == ["new 0", "old 1", "new 1", "new 2"]


def test_copies_in_int8_of_embeddings_that_were_damaged_go_when_they_are_restored(folder: Path) -> None:
    """This includes older segments without checksums of their rows."""
    with closing(Index(SPEC, folder)) as index:
        add(index, "a", "b", "c")
        (row,) = index._store.view().layout.segments
        path = folder / "segments" / row.name
        segment, embedding = index._store.view().segments[0], index.embeddings[1].numpy().tobytes()
        save_file({name: values.clone() for name, values in segment.arrays.items()}, path)
        content = path.read_bytes()
        damaged = content.replace(embedding, bytes(48))
        assert damaged != content
    path.write_bytes(damaged)
    with closing(Index(SPEC, folder)) as index:
        index._store.view().quantized  # noqa: B018 (made and kept)
        assert set(index.check()) == {"b"}
    assert len(list((folder / "cache").iterdir())) == 1
    path.write_bytes(content)
    with closing(Index(SPEC, folder)) as index:
        assert index.check() == {}
        assert list((folder / "cache").iterdir()) == []


def test_nothing_that_another_may_need_is_removed(folder: Path) -> None:
    """File times must not matter."""
    with closing(Index(SPEC, folder)) as index:
        add(index, "a")
        incoming = index.incoming
        (segment,) = (folder / "segments").glob("*.safetensors")
        index.search(embeddings(1), 1, mode="exact-int8")
        mine = [
            folder / "cache" / "a note.txt",
            folder / "segments" / "unnamed.safetensors",
            incoming / "of a worker.safetensors",
        ]
        taken_over = incoming / segment.name
        jobs = [
            incoming / f"job-{number}{'-segment.safetensors' if kind else '.lock'}"
            for number in "ab"
            for kind in (0, 1)
        ]
        orphan = incoming / "job-c-segment.safetensors"
        for path in (*mine, *jobs, orphan):
            path.write_bytes(b"content")
            os.utime(path, (0, 0))
        os.link(segment, taken_over)
        with locked(jobs[2]), locked(incoming / f".{'a' * 32}.tmp") as temporary:
            report = index.maintain()
            assert report["unreferenced_segments"] == 1
            assert all(path.exists() for path in (*mine, *jobs[2:], segment))
            assert not any(path.exists() for path in (*jobs[:2], orphan, taken_over))
            assert os.fstat(temporary.fileno()).st_nlink == 1
        assert len(list((folder / "cache").iterdir())) == 2
        index.maintain()
        assert {path.name for path in incoming.iterdir()} == {mine[2].name}


def test_a_segment_that_was_replaced_goes_though_its_process_was_killed_then(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Index(SPEC, folder)) as index:
        add(index, "a")
        add(index, "b", seed=1)
        with monkeypatch.context() as patch:
            patch.setattr(upkeep, "sweep", lambda store: None)
            index.maintain()
        assert len(list((folder / "segments").glob("*.safetensors"))) == 3
        assert index.maintain()["unreferenced_segments"] == 0
        assert len(list((folder / "segments").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("note", ['["../../precious"]', '["/etc/passwd"]', "7", '[["a"]]'])
def test_no_note_removes_what_is_elsewhere(folder: Path, note: str) -> None:
    (folder.parent / "precious").touch()
    with closing(Index(SPEC, folder)) as index:
        add(index, "a")
        add(index, "b", seed=1)
        index._store.catalogue.keep("replaced", json.loads(note))
        with pytest.raises(StoreError, match=r"expected (names of segments|a file name without a folder)"):
            index.maintain()
    assert (folder.parent / "precious").exists()


def test_a_snapshot_stays_in_its_folder(folder: Path, tmp_path: Path) -> None:
    with closing(Index(SPEC, folder)) as index:
        add(index, "a")
        (segment,) = (folder / "segments").glob("*.safetensors")
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / segment.name).write_bytes(segment.read_bytes())
        segment.unlink()
        segment.symlink_to(tmp_path / "elsewhere" / segment.name)
        with pytest.raises(StoreError, match="1 items are damaged, such as 'a'"):
            index.snapshot(tmp_path / "copy")
        assert "is a symbolic link" in index.check()["a"]
    assert list((tmp_path / "copy").iterdir()) == []
    with closing(sqlite3.connect(folder / "catalogue.sqlite")) as catalogue:
        catalogue.execute("UPDATE segment SET name = '../../escaped.conf'")
        catalogue.commit()
    (folder.parent / "escaped.conf").write_bytes((tmp_path / "elsewhere" / segment.name).read_bytes())
    for use in (
        lambda index: index.snapshot(tmp_path / "copy"),
        lambda index: index.maintain(),
        lambda index: index._store.view(),
    ):
        with pytest.raises(StoreError), closing(stored_index(folder)) as index:
            use(index)
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "elsewhere", "escaped.conf", "index"}
    assert not (tmp_path / "copy" / "segments").exists()


def test_a_want_of_open_files_is_no_damage(folder: Path) -> None:
    with closing(Index(SPEC, folder, skip_damaged=True)) as index:
        add(index, "a")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        held = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        try:
            with suppress(OSError):
                while True:
                    held.append(os.open("/dev/null", os.O_RDONLY))
            for use in (index.check, index.repair, index.maintain):
                with pytest.raises(StoreError):
                    use()
        finally:
            for descriptor in held:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert index.check() == {}
        assert index.ids == ["a"]
