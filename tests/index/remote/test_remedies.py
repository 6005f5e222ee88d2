"""What an error of a store advises is done here, and helps."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finelip_fast.cli import main
from finelip_fast.errors import FineLIPError
from finelip_fast.index import Index, IndexSpec, stored_index
from finelip_fast.index.remote.lance import LanceStore, open_store
from finelip_fast.index.remote.sync import pull, push

lance = pytest.importorskip("lance")
pa = pytest.importorskip("pyarrow")

SPEC = IndexSpec(checkpoint="abc", tokens=3, width=8)
IDS = ["a", "b", "c", "d"]


def embeddings(rows: int, seed: int = 0) -> Tensor:
    values = torch.randn(rows, SPEC.tokens, SPEC.width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1).half()


ONE = embeddings(1)


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with closing(Index(SPEC, tmp_path / "an index", source="somewhere")) as index:
        index.add(IDS, embeddings(4), [{"of": item} for item in IDS])
        yield index


@pytest.fixture
def store(index: Index, tmp_path: Path) -> LanceStore:
    store = LanceStore(SPEC, tmp_path / "a store", source="somewhere")
    push(index, store)
    return store


def refusal(call: Callable[[], Any], advice: str) -> str:
    """The message of an error that must come, and advise this."""
    with pytest.raises(FineLIPError, match=advice) as caught:
        call()
    return str(caught.value)


def finelip(message: str, command: str, **filled: object) -> None:
    """Run the command that a message advises; words in capitals are what the user fills in."""
    match = re.search(rf"finelip ({command}.*?)(?:, or|$)", message)
    assert match, message
    assert main([*(str(filled.get(word, word)) for word in shlex.split(match[1])), "--quiet"]) == 0


def test_where_there_is_no_store_one_is_made(index: Index, tmp_path: Path) -> None:
    place = tmp_path / "a new store"
    finelip(refusal(lambda: open_store(place), "there is no store at"), "index push", FOLDER=index.folder)
    assert len(open_store(place)) == len(IDS)


@pytest.mark.parametrize("way", ["restored", "pushed"])
def test_a_store_that_is_gone_is_restored_or_pushed_again(index: Index, store: LanceStore, way: str) -> None:
    away = shutil.move(store.uri, f"{store.uri} away")
    refusal(lambda: len(store), "no longer exists; restore it, or push an index to it again")
    if way == "restored":
        shutil.move(away, store.uri)
    else:
        push(index, LanceStore(SPEC, store.uri))
    assert len(store) == len(IDS)


def test_a_store_is_opened_by_its_checkpoint_or_another_is_made(store: LanceStore, tmp_path: Path) -> None:
    other_spec = replace(SPEC, checkpoint="other")
    refusal(
        lambda: LanceStore(other_spec, store.uri), "open it with the checkpoint that wrote it, or create another store"
    )
    assert len(LanceStore(SPEC, store.uri)) == len(IDS)
    assert len(LanceStore(other_spec, tmp_path / "another")) == 0


def test_an_index_of_rounded_embeddings_is_pushed_from_a_float16_folder(store: LanceStore, tmp_path: Path) -> None:
    with closing(Index(replace(SPEC, dtype="int8"), tmp_path / "rounded")) as rounded:
        rounded.add(IDS, embeddings(4), [{}] * 4)
        refusal(lambda: LanceStore(rounded.spec, tmp_path / "new"), "into a float16 folder, and push that")
    with closing(Index(SPEC, tmp_path / "whole")) as index:
        index.add(IDS, embeddings(4), [{}] * 4)
        assert push(index, LanceStore(index.spec, tmp_path / "new"))["added"] == 4


def test_a_place_of_another_table_is_exchanged_for_one_of_its_own(tmp_path: Path) -> None:
    lance.write_dataset(pa.table({"x": [1]}), str(tmp_path / "table"))
    refusal(lambda: LanceStore(SPEC, tmp_path / "table"), "; use another address$")
    assert len(LanceStore(SPEC, tmp_path / "another")) == 0


@pytest.mark.parametrize(
    ("item", "advice", "mended"),
    [
        ("a", "already has 'a'; pass other ids", lambda store: store.upsert(["a"], ONE, [{}])),
        ("a", "already has 'a'; pass other ids", lambda store: store.add(["new"], ONE, [{}])),
        ("\udcff.jpg", "rename the file, or pass another id", lambda store: store.add(["ÿ.jpg"], ONE, [{}])),
    ],
    ids=["replaced", "another id", "UTF-8"],
)
def test_an_id_that_cannot_be_added(
    store: LanceStore, item: str, advice: str, mended: Callable[[LanceStore], None]
) -> None:
    refusal(lambda: store.add([item], ONE, [{}]), advice)
    mended(store)


def test_older_versions_are_changed_where_they_are_open_without_one(
    index: Index, store: LanceStore, tmp_path: Path
) -> None:
    old = open_store(store.uri, version=1)
    refusal(lambda: old.add(["new"], ONE, [{}]), "open it without version to change it")
    open_store(store.uri).add(["new"], ONE, [{}])
    with closing(stored_index(index.folder, version=1)) as before:
        refusal(lambda: push(before, store), "open its folder without version")
    with closing(stored_index(index.folder)) as newest:
        assert push(newest, store)["removed"] == 1


@pytest.mark.parametrize("way", ["all", "keep"])
@pytest.mark.parametrize("state", ["part", "interrupted", "unreadable"])
def test_a_copy_that_is_not_whole_is_pulled_whole_or_pushed_with_all_else_kept(
    store: LanceStore, tmp_path: Path, state: str, way: str
) -> None:
    folder = tmp_path / "copy"
    pull(store, folder, part=(0, 2) if state == "part" else (0, 1))
    with closing(stored_index(folder)) as copy:
        note = copy._store.catalogue.note("copy")
        if state != "part":
            copy._store.catalogue.keep("copy", {**note, "version": None} if state == "interrupted" else {"part": 5})
        message = refusal(lambda: push(copy, store), "pull again" if state == "unreadable" else "pull all of it, or")
    if way == "keep" and state != "unreadable":
        assert "with remove=False (--keep)" in message
        with closing(stored_index(folder)) as copy:
            assert push(copy, store, remove=False)["removed"] == 0
    else:
        pull(store, folder)
        with closing(stored_index(folder)) as copy:
            assert push(copy, store)["removed"] == 0
    assert len(store) == len(IDS)


def test_a_folder_that_was_not_pulled_is_pushed_and_another_is_pulled(index: Index, tmp_path: Path) -> None:
    store = LanceStore(SPEC, tmp_path / "new store")
    refusal(lambda: pull(store, index.folder), "push them first, and pull into another folder")
    push(index, store)
    assert pull(store, tmp_path / "another folder")["added"] == len(IDS)


def exchange(store: LanceStore, column: str) -> None:
    """Exchange what two rows have in a column."""
    table = store.dataset().to_table()
    at = table.schema.get_field_index(column)
    values = pa.chunked_array([table[column].combine_chunks().take([1, 0, 2, 3])])
    lance.write_dataset(
        table.set_column(at, table.schema.field(at), values), store.uri, mode="overwrite", schema=table.schema
    )


def double(store: LanceStore, item: str) -> None:
    dataset = lance.dataset(store.uri)
    lance.write_dataset(dataset.to_table(filter=f"id = '{item}'"), dataset, mode="append")


@pytest.mark.parametrize(
    ("damage", "advice", "ids"),
    [
        (
            lambda store: exchange(store, "tokens"),
            r"delete them with LanceStore\.delete, and push them again",
            ["a", "b"],
        ),
        (lambda store: double(store, "b"), r"delete it with LanceStore\.delete and push it again", ["b"]),
    ],
    ids=["damaged", "twice"],
)
def test_rows_that_are_wrong_are_taken_out_and_pushed_again(
    index: Index, store: LanceStore, tmp_path: Path, damage: Callable[[LanceStore], None], advice: str, ids: list[str]
) -> None:
    damage(store)
    opened = open_store(store.uri)
    message = refusal(lambda: pull(opened, tmp_path / "copy"), advice)
    assert all(repr(item) in message for item in ids)
    opened.delete(ids)
    push(index, opened)
    pull(opened, tmp_path / "copy")
    with closing(stored_index(tmp_path / "copy")) as copy:
        assert sorted(copy.ids) == IDS


@pytest.mark.parametrize("way", ["repaired", "restored"])
def test_an_index_of_damaged_items_is_repaired_or_restored_and_pushed(index: Index, tmp_path: Path, way: str) -> None:
    store = LanceStore(SPEC, tmp_path / "new store")
    (segment,) = (index.folder / "segments").glob("*.safetensors")
    sound, row = segment.read_bytes(), index.embeddings[1].numpy().tobytes()
    segment.write_bytes(sound.replace(row, row[:-1] + bytes([row[-1] ^ 1])))
    message = refusal(lambda: push(index, store), "such as 'b', and were not pushed; remove them with")
    assert "or restore their files" in message
    if way == "restored":
        segment.write_bytes(sound)
    else:
        finelip(message, "index repair")
    with closing(stored_index(index.folder)) as opened:
        assert push(opened, store)["added"] == len(IDS) - (way == "repaired")


def test_what_another_process_compacts_is_pushed_again(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LanceStore(SPEC, tmp_path / "new store")
    with monkeypatch.context() as patch:
        patch.setattr(type(index._store.view()), "read", _no_file)
        refusal(lambda: push(index, store), "another process is compacting the index; try again")
    assert push(index, store)["added"] == len(IDS)


def _no_file(*_: object) -> Tensor:
    raise FileNotFoundError
