"""Acknowledged items survive the loss of their records: lost segments are restored, and a damaged catalogue is rebuilt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finelip_fast.cli import main
from finelip_fast.errors import StoreError
from finelip_fast.index import Index, IndexSpec, restore, stored_index
from finelip_fast.index.catalogue import Catalogue
from finelip_fast.index.lists import list_path, read_list

SPEC = IndexSpec(checkpoint="abc", tokens=3, width=8)


def embeddings(rows: int, seed: int = 0) -> Tensor:
    values = torch.randn(rows, SPEC.tokens, SPEC.width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1).half().float()


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A folder whose last two changes are only in the log, as left by a killed writer."""
    with closing(Index(SPEC, tmp_path / "index", source="mine")) as index:
        index.add(["a", "b"], embeddings(2), [{"n": 0}, {"n": 1}])
    with closing(Index(SPEC, tmp_path / "index")) as index:
        index.add(["c", "caf\udce9"], embeddings(2, 1), [{"n": 2}, {"n": "é"}])
        index.add(["d"], embeddings(1, 2), [{}])
        shutil.copytree(tmp_path / "index", tmp_path / "killed")
    return tmp_path / "killed"


def cut(log: Path) -> None:
    log.write_bytes(log.read_bytes()[: log.stat().st_size // 2])


def flip(log: Path) -> None:
    content = bytearray(log.read_bytes())
    content[40] ^= 1
    log.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, lambda log: log.write_bytes(b"")], ids=["cut", "flipped", "emptied"])
def test_what_a_damaged_log_has_lost_is_named_and_taken_back(killed: Path, damage: Callable[[Path], object]) -> None:
    damage(killed / "catalogue.sqlite-wal")
    (killed / "catalogue.sqlite-shm").unlink()
    with closing(stored_index(killed)) as index:
        ids = index.ids
        assert len(ids) < 5
        assert sum(index.lost().values()) == 5 - len(ids)
        index.maintain()  # does not touch them
        assert sum(index.lost().values()) == 5 - len(ids)
        assert index.repair() == {}
        assert index.lost() == {}
    with closing(stored_index(killed)) as index:
        assert index.ids == ["a", "b", "c", "caf\udce9", "d"]
        assert index.metadata == [{"n": 0}, {"n": 1}, {"n": 2}, {"n": "é"}, {}]
        rows = torch.cat([embeddings(2), embeddings(2, 1), embeddings(1, 2)])
        assert torch.equal(index.embeddings, rows.half())
        assert index.check() == {}


def test_ids_that_are_there_again_stay_as_they_are(killed: Path) -> None:
    (killed / "catalogue.sqlite-wal").write_bytes(b"")
    with closing(stored_index(killed)) as index:
        index.add(["c", "d"], embeddings(2, 7), [{"new": 1}, {"new": 2}])
        assert sum(index.lost().values()) == 3
        index.repair()
        assert index.ids == ["a", "b", "c", "d", "caf\udce9"]
        assert index.metadata[2:4] == [{"new": 1}, {"new": 2}]
        assert index.lost() == index.check() == {}
        index.maintain()
        assert len(list((killed / "segments").iterdir())) == 2  # one segment and its list


@pytest.mark.parametrize("has_copy", [True, False], ids=["copy", "no copy"])
def test_a_damaged_catalogue_is_made_anew(tmp_path: Path, has_copy: bool, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "index"
    with closing(Index(SPEC, folder, source="mine")) as index:
        index.add(["a", "b"], embeddings(2), [{}, {}])
        index.add(["c"], embeddings(1, 1), [{}])
        index.delete(["b"])
        if has_copy:
            index.maintain()
        index.add(["d"], embeddings(1, 2), [{"n": 1}])
    content = bytearray((folder / "catalogue.sqlite").read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    (folder / "catalogue.sqlite").write_bytes(content)
    with pytest.raises(StoreError, match=r"finelip index repair --index .* --restore"):
        stored_index(folder)
    notice = f"set the root with finelip index move-root FOLDER --index {folder}"
    with nullcontext() if has_copy else pytest.warns(UserWarning, match=notice):
        assert main(["index", "repair", "--index", str(folder), "--restore"]) == 0
    capsys.readouterr()
    with closing(stored_index(folder)) as index:
        # Without a copy, nothing records what was deleted.
        assert index.ids == (["a", "c", "d"] if has_copy else ["a", "b", "c", "d"])
        assert index.metadata[-1] == {"n": 1}
        assert index.source == "mine"
        assert index.check() == index.lost() == {}
    assert (folder / "catalogue.damaged.sqlite").read_bytes() == content


def test_nothing_to_restore_from(tmp_path: Path) -> None:
    with closing(Index(SPEC, tmp_path)):
        pass
    with pytest.raises(StoreError, match=r"found neither .* nor a list"):
        restore(tmp_path)
    with closing(Index(SPEC, tmp_path)) as index:
        assert index.ids == []


@pytest.mark.parametrize(
    "content", [b"", b"{}\n", b"\xff" * 99, b'{"spec": {"version": 1}, "rows": 1, "crc": 0}\n[1]\n']
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    list_path(tmp_path, "x.safetensors").write_bytes(content)
    with pytest.raises(StoreError, match="expected"):
        read_list(tmp_path, "x.safetensors")


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """An index to which ``a`` and ``b`` were being added when the writer was stopped."""
    with closing(Index(SPEC, tmp_path / "index")) as index:
        add = Catalogue.add

        def interrupt(*arguments: Any) -> None:
            add(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Catalogue, "add", interrupt)
            with pytest.raises(KeyboardInterrupt):
                index.add(["a", "b"], embeddings(2), [{}, {}])
        assert sum(index.lost().values()) == 2
        yield index


def segments_of(index: Index) -> int:
    assert index.folder is not None
    return len(list((index.folder / "segments").glob("*.safetensors")))


@pytest.mark.parametrize("change", ["delete", "relabel"])
def test_what_was_deleted_after_a_retry_stays_deleted(interrupted: Index, change: str) -> None:
    index = interrupted
    index.add(["a", "b"], embeddings(2), [{}, {}])
    if change == "delete":
        index.delete(["a"])
    else:
        index.relabel(["a"], ["z"], [{}])
    index.maintain()  # forgets what was deleted
    assert index.lost() == {}
    ids = index.ids
    assert index.repair() == {}
    assert index.ids == ids
    assert "a" not in index


def test_what_was_not_added_again_is_taken_back_without_what_was_deleted(interrupted: Index) -> None:
    index = interrupted
    index.add(["a"], embeddings(1), [{"n": 1}])
    index.delete(["a"])
    assert sum(index.lost().values()) == 1
    index.repair()
    assert index.ids == ["b"]
    assert torch.equal(index.embeddings, embeddings(2)[1:].half())
    assert index.maintain()["unreferenced_segments"] == 0
    assert segments_of(index) == 1


def test_repair_removes_a_segment_whose_items_were_all_added_again(interrupted: Index) -> None:
    index = interrupted
    index.add(["a", "b"], embeddings(2), [{}, {}])
    assert segments_of(index) == 2
    assert index.maintain()["unreferenced_segments"] == 1
    version = index.version
    index.repair()
    assert (index.ids, index.version, segments_of(index)) == (["a", "b"], version, 1)
    assert index.maintain()["unreferenced_segments"] == 0


@pytest.mark.parametrize("note", ['["a"]', '{"a": 1}', '{"a": ["x"]}'])
def test_an_invalid_note_of_deleted_items_is_refused(interrupted: Index, note: str) -> None:
    interrupted._store.catalogue.keep("deleted", json.loads(note))
    with pytest.raises(StoreError, match="expected rows of segments"):
        interrupted.lost()


def test_a_change_that_fails_leaves_no_segment_to_take_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Index(SPEC, tmp_path)) as index:

        def refuse(*_: object) -> None:
            raise StoreError("refused")

        monkeypatch.setattr(index._store.catalogue, "add", refuse)
        with pytest.raises(StoreError, match="refused"):
            index.add(["a"], embeddings(1), [{}])
        assert list((tmp_path / "segments").iterdir()) == []
