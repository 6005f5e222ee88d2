"""Disk failures: errors say what to do, nothing is lost, and the rest stays readable."""

from __future__ import annotations

import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor

from finelip_fast.cli import main
from finelip_fast.errors import StoreError
from finelip_fast.index import Index, IndexSpec, stored_index, stored_source, upkeep

SPEC = IndexSpec(checkpoint="abc", tokens=4, width=64)
Guest = Callable[[Path], AbstractContextManager[None]]


def embeddings(rows: int, seed: int = 0) -> Tensor:
    values = torch.randn(rows, SPEC.tokens, SPEC.width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with closing(Index(SPEC, tmp_path / "index")) as index:
        index.add(["a", "b"], embeddings(2), [{}, {}])
    return tmp_path / "index"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of written files, the closest to a full disk without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("limit", "count", "metadata"),
    [(1000, 5, {}), (50_000, 500, {}), (90_000, 5, {"text": "x" * 90_000})],
    ids=["in a small segment", "in the segment", "in the catalogue"],
)
def test_a_full_disk(folder: Path, limit: int, count: int, metadata: dict) -> None:
    with closing(Index(SPEC, folder)) as index:
        before = index.search(embeddings(1), 5).items
        with (
            largest_file(limit),
            pytest.raises(StoreError, match=r"cannot write .*large|cannot be written: .*(full|I/O)"),
        ):
            index.add([f"new {n}" for n in range(count)], embeddings(count, 1), [metadata] * count)
        assert index.search(embeddings(1), 5).items == before
        assert list(index.ids) == ["a", "b"]
        assert not list((folder / "segments").glob("*.part"))
        index.add(["c"], embeddings(1, 2), [{}])
    with closing(Index(SPEC, folder)) as index:
        assert index.ids == ["a", "b", "c"]
        assert index.check() == {}
        index.maintain()
        assert index.check() == {}


@pytest.mark.parametrize(
    "reason", ["attempt to write a readonly database", "disk I/O error", "database or disk is full"]
)
def test_a_full_disk_is_told_from_a_catalogue_that_must_not_be_written(
    folder: Path, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite says readonly if it cannot create its log."""

    def refuse(*_: object) -> None:
        raise sqlite3.OperationalError(reason)

    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 19))
    with closing(Index(SPEC, folder)) as index:
        monkeypatch.setattr(index._store.catalogue._database, "_open_writer", refuse)
        with pytest.raises(StoreError, match=rf"{reason}; the disk may be full: 0\.5 MiB are free at {folder}"):
            index.delete(["a"])
        assert index.ids == ["a", "b"]


@pytest.mark.parametrize("compact", [Index.maintain, Index.compact_recent])
def test_compaction_on_a_full_disk_changes_nothing(
    folder: Path, compact: Callable[[Index], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "_MANY", 2)
    with closing(Index(SPEC, folder)) as index:
        index.add([f"new {n}" for n in range(100)], embeddings(100, 1), [{}] * 100)
        before = index.ids
        with largest_file(40_000), pytest.raises(StoreError, match="cannot write"):
            compact(index)
        assert index.ids == before
        assert index.check() == {}
        assert index.maintain()["segments_before"] == 2
        assert index.ids == before


def test_a_folder_that_cannot_be_written_to_can_be_searched(folder: Path, as_a_guest: Guest) -> None:
    query = embeddings(1)
    with closing(Index(SPEC, folder)) as index:
        expected = index.search(query, 5).items
    with as_a_guest(folder), closing(Index(SPEC, folder)) as index:
        for mode in ("exact", "exact-int8", "two-stage"):
            assert index.search(query, 5, mode=mode).items == expected
        assert index.check() == {}
        for change in (
            lambda: index.add(["c"], embeddings(1), [{}]),
            lambda: index.delete(["a"]),
            index.maintain,
            lambda: index.speed_up("n"),
        ):
            with pytest.raises(StoreError, match=r"cannot be written: attempt to write a readonly database$"):
                change()
        assert index.ids == ["a", "b"]


def as_a_writer_was_killed(folder: Path, target: Path) -> Path:
    """Copy the folder with its last change only in the log, as a killed writer leaves it."""
    with closing(Index(SPEC, folder)) as index:
        index.add(["c"], embeddings(1, 2), [{}])
        shutil.copytree(folder, target)
    assert (target / "catalogue.sqlite-wal").stat().st_size
    (target / "catalogue.sqlite-shm").unlink()
    return target


def test_a_folder_that_cannot_be_written_to_is_read_with_its_last_changes(
    folder: Path, tmp_path: Path, as_a_guest: Guest
) -> None:
    killed = as_a_writer_was_killed(folder, tmp_path / "killed")
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    with as_a_guest(killed), closing(Index(SPEC, killed)) as index:
        assert index.ids == ["a", "b", "c"]
        assert index.check() == {}
    assert {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()} == before


def test_reading_needs_no_room_on_the_disk(folder: Path, tmp_path: Path) -> None:
    killed = as_a_writer_was_killed(folder, tmp_path / "killed")
    for path, expected in ((folder, ["a", "b", "c"]), (killed, ["a", "b", "c"])):
        with largest_file(0), closing(stored_index(path)) as index:
            assert index.ids == expected
            assert len(index.search(embeddings(1), 5, where="id > ''").items[0]) == 3
            assert stored_source(path) == ""


def test_every_reading_command_reads_what_others_may_write(
    folder: Path, capsys: pytest.CaptureFixture[str], as_a_guest: Guest
) -> None:
    with as_a_guest(folder):
        assert main(["index", "check", "--index", str(folder)]) == 0
        assert stored_source(folder) == ""
        with closing(stored_index(folder, verify=True)) as index:
            assert index.lost() == index.check() == {}
            assert "a" in index
    assert "lost: 0" in capsys.readouterr().out


@pytest.mark.parametrize("is_killed", [False, True], ids=["closed", "with a log"])
def test_a_snapshot_is_taken_of_a_folder_that_cannot_be_written_to(
    folder: Path, tmp_path: Path, as_a_guest: Guest, is_killed: bool
) -> None:
    source = as_a_writer_was_killed(folder, tmp_path / "killed") if is_killed else folder
    with as_a_guest(source), TemporaryDirectory() as place:
        with closing(stored_index(source)) as index:
            index.snapshot(Path(place) / "copy")
            expected = index.ids
        with closing(stored_index(Path(place) / "copy")) as copy:
            assert copy.ids == expected
            assert copy.check() == {}
            copy.delete(["a"])


def test_a_folder_cannot_be_made_where_nothing_may_be(folder: Path, as_a_guest: Guest) -> None:
    with as_a_guest(folder), pytest.raises(StoreError, match=r"cannot make the index folder .*Permission denied"):
        Index(SPEC, folder / "below")


def test_little_memory_is_an_error(tmp_path: Path) -> None:
    script = Path(__file__).with_name("starve_an_index.py")
    run = subprocess.run([sys.executable, script, tmp_path / "index"], capture_output=True, text=True, timeout=1500)
    assert run.returncode == 0, run.stderr
    outcomes = [line.split(maxsplit=2) for line in run.stdout.splitlines()]
    assert [columns for columns in outcomes if columns[2] not in ("right", "error")] == []
    for room, expected in (("0", "error"), ("1000", "right")):
        results = {operation: result for operation, megabytes, result in outcomes if megabytes == room}
        assert results == dict.fromkeys(results, expected) != {}


def test_a_lost_catalogue_is_not_taken_for_an_empty_index(folder: Path) -> None:
    (folder / "catalogue.sqlite").rename(folder.parent / "kept")
    with pytest.raises(StoreError, match=r"has segments but no catalogue\.sqlite.*restore it from a snapshot"):
        Index(SPEC, folder)
    with pytest.raises(StoreError, match="there is no index at"):
        stored_index(folder)
    (folder.parent / "kept").rename(folder / "catalogue.sqlite")
    with closing(Index(SPEC, folder)) as index:
        assert index.ids == ["a", "b"]


def test_an_index_of_another_checkpoint_is_refused_and_stays_as_it_is(folder: Path) -> None:
    other_spec = IndexSpec(checkpoint="xyz", tokens=4, width=64)
    with pytest.raises(StoreError, match=r"checkpoint 'abc'.*checkpoint 'xyz'"):
        Index(other_spec, folder)
    with closing(Index(SPEC, folder)) as index:
        assert index.ids == ["a", "b"]
