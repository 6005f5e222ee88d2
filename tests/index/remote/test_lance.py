"""A Lance store holds what it was given, searches as an index does, and makes folders what it is."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finelip_fast.cli import main
from finelip_fast.errors import InputError, StoreError
from finelip_fast.index import Index, IndexSpec, stored_index, stored_source
from finelip_fast.index.remote import lance as stores
from finelip_fast.index.remote import tables
from finelip_fast.index.remote.lance import LanceStore, open_store
from finelip_fast.index.remote.sync import pull, push

pytest.importorskip("lance")

DAMAGE = Path(__file__).with_name("damage_a_store.py")
SPEC = IndexSpec(checkpoint="abc", tokens=3, width=8)
Content = dict[str, tuple[dict[str, Any], bytes]]


def embeddings(rows: int, seed: int = 0) -> Tensor:
    """Unit rows in float16."""
    values = torch.randn(rows, SPEC.tokens, SPEC.width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1).half()


def add(target: Index | LanceStore, *ids: str, seed: int = 0) -> None:
    target.add(ids, embeddings(len(ids), seed), [{"of": item} for item in ids])


def names(count: int, start: int = 0) -> list[str]:
    return [f"photos/{n}.jpg" for n in range(start, start + count)]


def content(of: Index | LanceStore) -> Content:
    """Metadata and the bits of the embedding of each item."""
    if isinstance(of, Index):
        return {
            item: (meta, row.numpy().tobytes())
            for item, meta, row in zip(of.ids, of.metadata, of.embeddings, strict=True)
        }
    return {
        item: (meta, row.numpy().tobytes())
        for ids, rows, metadata, _ in of.batches()
        for item, meta, row in zip(ids, metadata, rows, strict=True)
    }


def pulled(folder: Path) -> Content:
    with closing(stored_index(folder)) as index:
        return content(index)


def counts(report: dict[str, int]) -> tuple[int, int, int, int]:
    return report["added"], report["replaced"], report["removed"], report["unchanged"]


def damage(store: LanceStore, item: str, field: str) -> None:
    """Flip a bit of an item's embedding or metadata where it lies on the disk."""
    metadata, row = content(store)[item]
    value = row if field == "embedding" else json.dumps(metadata).encode()
    for path in Path(store.uri, "data").iterdir():
        raw = path.read_bytes()
        if value in raw:
            at = raw.index(value) + 5
            path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
            return
    raise AssertionError(f"the {field} lies in no file as it is")


@pytest.fixture
def store(tmp_path: Path) -> LanceStore:
    return LanceStore(SPEC, tmp_path / "store", source="somewhere")


@pytest.fixture
def index(tmp_path: Path) -> Any:
    with closing(Index(SPEC, tmp_path / "index", source="somewhere")) as index:
        yield index


@pytest.fixture
def small_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four items a change, eight keys a batch."""
    monkeypatch.setattr(stores, "_CHANGE", 4 * 2 * SPEC.tokens * SPEC.width)
    monkeypatch.setattr(stores, "_SCAN", 4 * 2 * SPEC.tokens * SPEC.width)
    monkeypatch.setattr(stores, "_ROWS", 8)


# The contract of an index -----------------------------------------------------------------------------------------------


IDS = st.sampled_from(["a", "b", "it's", 'qu"ote', "back\\slash", "nul\0", "Łódź/ß.jpg", "", "','"])
STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "upsert", "delete"]), st.lists(IDS, max_size=4, unique=True)), max_size=6
)


@settings(max_examples=12, deadline=None)
@given(STEPS)
def test_it_is_a_dictionary_with_versions(steps: list[tuple[str, list[str]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = LanceStore(SPEC, folder + "/store")
        model: Content = {}
        versions = {store.version: dict(model)}
        for number, (name, ids) in enumerate(steps):
            rows, metadata = embeddings(len(ids), number), [{"step": number, "ß\ud800": item} for item in ids]
            existing_ids = [item for item in ids if item in model]
            if name == "delete" and len(existing_ids) < len(ids):
                with pytest.raises(InputError, match="not in the store: "):
                    store.delete(ids)
            elif name == "delete":
                store.delete(ids)
                for item in ids:
                    del model[item]
            elif name == "add" and existing_ids:
                with pytest.raises(InputError, match=r"the store already has .*; pass other ids"):
                    store.add(ids, rows, metadata)
            else:
                getattr(store, name)(ids, rows, metadata)
                for item, row, meta in zip(ids, rows, metadata, strict=True):
                    model.pop(item, None)
                    model[item] = (meta, row.numpy().tobytes())
            assert content(store) == model
            assert len(store) == len(model)
            assert all((item in store) == (item in model) for item in ids)
            versions[store.version] = dict(model)
        for version, expected in versions.items():
            assert content(open_store(store.uri, version=version)) == expected
        with closing(Index(SPEC)) as index:
            push(index, store, remove=False)
            assert content(store) == model


def test_new_items_keep_their_order(store: LanceStore) -> None:
    order = [f"{n * 7919 % 30000}" for n in range(30000)]  # more than Lance writes at once
    for start in (0, 15000):
        store.add(order[start : start + 15000], embeddings(15000), [{}] * 15000)
    store.delete(order[5:7])
    assert [item for ids, *_ in store.batches() for item in ids] == order[:5] + order[7:]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["twice", "twice"], "expected unique ids, got 'twice' twice"),
        (["new", 7], "expected ids of type str, got 7"),
        (["\udcff.jpg"], r"expected ids that UTF-8 can hold, got '\\udcff.jpg'"),
    ],
)
def test_ids_must_be_new_texts(store: LanceStore, ids: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        store.add(ids, embeddings(len(ids)), [{}] * len(ids))
    assert len(store) == 0


def test_embeddings_and_metadata_must_fit(store: LanceStore) -> None:
    with pytest.raises(InputError, match=r"expected embeddings as a tensor \[1, 3, 8\], got \[2, 3, 8\]"):
        store.add(["a"], embeddings(2), [{}])
    with pytest.raises(InputError, match="expected metadata"):
        store.upsert(["a"], embeddings(1), [{"path": Path("a")}])
    assert store.version == 1


def test_another_spec_is_refused(store: LanceStore, tmp_path: Path) -> None:
    assert LanceStore(SPEC, store.uri).source == "somewhere"
    with pytest.raises(
        StoreError, match=r"written by checkpoint 'somewhere' with {'checkpoint': 'abc'}, and is opened"
    ):
        LanceStore(replace(SPEC, checkpoint="other"), store.uri, source="elsewhere")
    with pytest.raises(InputError, match="expected an index of dtype float16, got int8"):
        LanceStore(replace(SPEC, dtype="int8"), tmp_path / "new")
    with closing(Index(replace(SPEC, alpha=1.0))) as index, pytest.raises(InputError, match="expected an index of the"):
        push(index, store)


def test_a_store_follows_the_alpha_that_it_is_opened_with(store: LanceStore) -> None:
    add(store, "a", "b")
    again = LanceStore(replace(SPEC, alpha=0.5), store.uri)
    queries = embeddings(1)
    assert torch.equal(again.search(queries, 2).scores, store.search(queries, 2, alpha=0.5).scores)
    with closing(Index(again.spec)) as index:
        push(index, store, remove=True)
    assert len(store) == 0


def test_what_is_not_there_is_named(store: LanceStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no store at .*nothing; create it with finelip index push"):
        open_store(tmp_path / "nothing")
    with pytest.raises(StoreError, match="there is no version 9 of a store at"):
        open_store(store.uri, version=9)
    with pytest.raises(StoreError, match=r"the store is open at version .*, read-only"):
        add(open_store(store.uri, version=1), "a")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot create a store at|cannot be opened"):
        LanceStore(SPEC, tmp_path / "file")


def test_a_foreign_table_is_refused(tmp_path: Path) -> None:
    import lance
    import pyarrow as pa

    lance.write_dataset(pa.table({"x": [1]}), str(tmp_path / "table"))
    with pytest.raises(StoreError, match=r"expected a store written by finelip_fast, got a table of \['x'\]"):
        LanceStore(SPEC, tmp_path / "table")


@pytest.mark.parametrize(
    "changed", [{"alpha": 5}, {"alpha": "x"}, {"tokens": 0}, {"width": 1 << 40}, {"source": 3}], ids=str
)
def test_a_table_that_says_what_no_store_can_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    import lance

    store = LanceStore(SPEC, tmp_path / "store")
    schema = store.dataset().schema
    spec = json.loads(schema.metadata[tables.SPEC]) | changed
    table = schema.with_metadata({tables.SPEC: json.dumps(spec)}).empty_table()
    lance.write_dataset(table, tmp_path / "other")
    with pytest.raises(StoreError, match="expected source, checkpoint, dtype, tokens, width and alpha"):
        open_store(tmp_path / "other")


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lance", None)
    tables.lance_module.cache_clear()
    with pytest.raises(StoreError, match=r"pylance is not installed .*: pip install 'finelip-fast\[lance\]'"):
        LanceStore(SPEC, tmp_path / "store")
    tables.lance_module.cache_clear()


def test_of_two_additions_the_second_is_undone(store: LanceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    look = LanceStore._refuse_known
    for ids in (["a", "b"], ["c", "d"]):
        with monkeypatch.context() as patch:

            def look_too_early(self: LanceStore, *arguments: Any, patch: pytest.MonkeyPatch = patch) -> None:
                look(self, *arguments)
                patch.undo()
                add(LanceStore(SPEC, store.uri), "b", f"other {len(store)}", seed=1)

            patch.setattr(LanceStore, "_refuse_known", look_too_early)
            if "b" in ids:
                with pytest.raises(InputError, match="the store already has 'b'; pass other ids"):
                    add(store, *ids)
                assert list(content(store)) == ["b", "other 0"]
                store.delete(["b"])
            else:
                add(store, *ids)
                assert list(content(store)) == ["other 0", "b", "other 1", "c", "d"]


def test_two_writers(store: LanceStore) -> None:
    """One of those that add the same item succeeds; changes of different items are all made."""
    refused: list[Exception] = []

    def write(prefix: str) -> None:
        writer = LanceStore(SPEC, store.uri)
        for number in range(4):
            try:
                add(writer, f"shared {number}", seed=number)
            except InputError as error:
                refused.append(error)
            add(writer, f"{prefix} {number}", seed=number)
            writer.upsert(["contended"], embeddings(1, seed=number), [{}])

    threads = [threading.Thread(target=write, args=[prefix]) for prefix in "xy"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 4
    assert sorted(item for ids, *_ in store.batches() for item in ids) == [
        "contended",
        *(f"{prefix} {number}" for prefix in ("shared", "x", "y") for number in range(4)),
    ]


# Searching --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_changes")
@pytest.mark.parametrize("k", [1, 6, 50])
@pytest.mark.parametrize("where", [None, "camera = 'b' or id = 'photos/3.jpg'", "camera = 'none'"])
def test_search_agrees_with_an_index(store: LanceStore, k: int, where: str | None) -> None:
    with closing(Index(SPEC)) as index:
        rows = embeddings(5)[torch.arange(23) % 5]  # ties, in other batches too
        for target in (store, index):
            target.add(names(23), rows, [{"camera": "abc"[n % 3]} for n in range(23)])
            target.delete(names(2, start=9))
        queries = torch.cat([embeddings(3, seed=9), rows[:1]]).float()
        for alpha in (None, 0.0, 1.0):
            results, right = (
                target.search(queries, k, alpha=alpha, where=where, **mode)
                for target, mode in ((store, {}), (index, {"mode": "exact"}))
            )
            assert torch.equal(results.scores, right.scores)
            assert torch.equal(results.numbers, right.numbers)
            torch.testing.assert_close(results.global_scores, right.global_scores, atol=1e-6, rtol=0)
            torch.testing.assert_close(results.fine_scores, right.fine_scores, atol=1e-6, rtol=0)
            for hits, expected_hits in zip(results.items, right.items, strict=True):
                assert [(hit.id, hit.metadata) for hit in hits] == [(hit.id, hit.metadata) for hit in expected_hits]
                assert [hit.crc for hit in hits] == [zlib.crc32(rows[int(hit.id[7:-4])].numpy()) for hit in hits]


def test_searching_an_empty_store_finds_nothing(store: LanceStore) -> None:
    results = store.search(embeddings(2), 5)
    assert results.scores.shape == results.fine_scores.shape == results.numbers.shape == (2, 0)
    assert results.items == [[], []]
    add(store, "a")
    assert store.search(embeddings(0), 5).items == []
    with pytest.raises(InputError, match="k"):
        store.search(embeddings(1), 0)


# Pushing and pulling ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_changes")
def test_a_round_trip_loses_nothing(index: Index, store: LanceStore, tmp_path: Path) -> None:
    for start in (0, 6, 20):
        index.add(names(12, start=start)[:6], embeddings(6, seed=start), [{"ß": [start, 0.1]}] * 6)
    index.delete(names(1, start=2))
    assert counts(push(index, store)) == (17, 0, 0, 0)
    assert content(store) == content(index)
    assert counts(pull(store, tmp_path / "copy")) == (17, 0, 0, 0)
    with closing(stored_index(tmp_path / "copy")) as copy:
        assert copy.spec == SPEC
        assert (copy.ids, copy.metadata) == (index.ids, index.metadata)
        assert torch.equal(copy.embeddings, index.embeddings)
        assert copy.check() == {}
    assert stored_source(tmp_path / "copy") == "somewhere"


@pytest.mark.usefixtures("small_changes")
@pytest.mark.parametrize("in_memory", [False, True])
def test_only_differences_are_sent(store: LanceStore, tmp_path: Path, in_memory: bool) -> None:
    folder = tmp_path / "copy"
    with closing(Index(SPEC, None if in_memory else tmp_path / "index")) as index:
        add(index, *names(20))
        push(index, store)
        pull(store, folder)
        version = store.version
        assert push(index, store) == {"added": 0, "replaced": 0, "removed": 0, "unchanged": 20, "version": version}
        index.upsert(names(1), embeddings(1, seed=5), [{"of": "photos/0.jpg"}])
        index.upsert(names(1, start=1), embeddings(20)[1:2], [{"of": "other metadata"}])
        index.delete(names(3, start=10))
        add(index, *names(6, start=50))
        assert counts(push(index, store)) == (6, 2, 3, 15)
        assert content(store) == content(index)
        assert counts(pull(store, folder)) == (6, 2, 3, 15)
        assert pulled(folder) == content(index)
        assert counts(pull(store, folder)) == (0, 0, 0, 23)
        assert counts(pull(open_store(store.uri, version=version), folder)) == (3, 2, 6, 15)
        assert len(pulled(folder)) == 20
        index.delete(index.ids)
        assert counts(push(index, store)) == (0, 0, 23, 0)
        assert len(store) == 0


@pytest.mark.usefixtures("small_changes")
def test_parts_are_disjoint_and_complete(store: LanceStore, tmp_path: Path) -> None:
    add(store, *names(40))
    parts = []
    for number in range(3):
        pull(store, tmp_path / str(number), part=(number, 3))
        parts.append(pulled(tmp_path / str(number)))
        assert all(zlib.crc32(item.encode()) % 3 == number for item in parts[-1])
    assert sum(map(len, parts)) == 40
    assert parts[0] | parts[1] | parts[2] == content(store)
    with closing(stored_index(tmp_path / "1")) as part:
        with pytest.raises(InputError, match="expected a complete index to push, got part 1 of 3 of"):
            push(part, store)
        assert push(part, store, remove=False)["unchanged"] == len(part)
    pull(store, tmp_path / "1", part=(1, 2))  # another division moves what it must
    assert set(pulled(tmp_path / "1")) == {item for item in names(40) if zlib.crc32(item.encode()) % 2 == 1}
    for wrong in ((3, 3), (-1, 2), (0, 0), (0.5, 2), ("0", 1), (True, 2), "01", (0,), (0, 1, 2), None):
        with pytest.raises(InputError, match=r"expected a part \(i, n\) of integers with 0 <= i < n, got"):
            pull(store, tmp_path / "1", part=wrong)  # type: ignore[arg-type]
    assert len(pulled(tmp_path / "1"))


@pytest.mark.usefixtures("small_changes")
def test_an_interrupted_pull_goes_on(store: LanceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(store, *names(30))
    pull(store, tmp_path / "whole")
    folder = tmp_path / "copy"
    with monkeypatch.context() as patch:
        upserts = []

        def upsert(self: Index, *arguments: Any, original_upsert: Callable[..., None] = Index.upsert) -> None:
            if len(upserts) == 3:
                raise KeyboardInterrupt
            upserts.append(original_upsert(self, *arguments))

        patch.setattr(Index, "upsert", upsert)
        with pytest.raises(KeyboardInterrupt):
            pull(store, folder)
    with closing(stored_index(folder)) as index:
        assert len(index) == 12
        with pytest.raises(InputError, match="got what an interrupted pull left of"):
            push(index, store)
    assert counts(pull(store, folder)) == (18, 0, 0, 12)
    assert list(pulled(folder).items()) == list(pulled(tmp_path / "whole").items())


@pytest.mark.usefixtures("small_changes")
def test_an_interrupted_push_goes_on(index: Index, store: LanceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    add(index, *names(30))
    with monkeypatch.context() as patch:
        additions = []

        def add_some(self: LanceStore, *arguments: Any, original_add: Callable[..., None] = LanceStore.add) -> None:
            if len(additions) == 3:
                raise KeyboardInterrupt
            additions.append(original_add(self, *arguments))

        patch.setattr(LanceStore, "add", add_some)
        with pytest.raises(KeyboardInterrupt):
            push(index, store)
    assert len(store) == 12
    assert counts(push(index, store)) == (18, 0, 0, 12)
    assert list(content(store).items()) == list(content(index).items())


@pytest.mark.parametrize("field", ["embedding", "metadata"])
def test_damaged_rows_are_never_pulled(store: LanceStore, tmp_path: Path, field: str) -> None:
    add(store, *names(12))
    sound = content(store)
    pull(store, tmp_path / "before")
    damage(store, "photos/7.jpg", field)
    with pytest.raises(StoreError, match=r"1 rows of the store at .* are not what was written: 'photos/7.jpg'; delete"):
        pull(store, tmp_path / "copy")
    del sound["photos/7.jpg"]
    assert pulled(tmp_path / "copy") == sound
    with pytest.raises(StoreError, match=r"are not what was written: 'photos/7.jpg'"):
        content(store)
    with pytest.raises(StoreError, match=r"are not what was written: 'photos/7.jpg'"):
        store.search(embeddings(12)[7:8], 1)
    with closing(stored_index(tmp_path / "before")) as index:  # as the message says
        store.delete(["photos/7.jpg"])
        push(index, store)
    assert pull(store, tmp_path / "copy")["added"] == 1
    assert pulled(tmp_path / "copy") == content(store) == pulled(tmp_path / "before")


@pytest.mark.parametrize("column", ["id", "metadata", "tokens"])
def test_values_that_change_places_are_damage(store: LanceStore, tmp_path: Path, column: str) -> None:
    import lance
    import pyarrow as pa

    add(store, "a", "b")
    table = store.dataset().to_table()
    at = table.schema.get_field_index(column)
    swapped = table.set_column(
        at, table.schema.field(at), pa.chunked_array([table[column].combine_chunks().take([1, 0])])
    )
    lance.write_dataset(swapped, store.uri, mode="overwrite", schema=table.schema)
    again = open_store(store.uri)
    for look in (
        lambda: list(again.batches()),
        lambda: again.search(embeddings(1), 2),
        lambda: pull(again, tmp_path / "p"),
    ):
        with pytest.raises(StoreError, match=r"2 rows of the store .* are not what was written"):
            look()


def test_stores_of_the_first_format_are_read_and_written(
    store: LanceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their checksums leave out the ids."""
    with monkeypatch.context() as patch:
        patch.setattr(stores, "_FORMAT", 1)
        old = LanceStore(SPEC, tmp_path / "old")
        add(old, "a", "b")
    assert old.take(old.dataset(), [0]).metadata_crcs == [zlib.crc32(json.dumps({"of": "a"}).encode())]
    again = open_store(old.uri)
    add(again, "c", seed=1)
    with closing(Index(SPEC)) as index:
        add(index, "a", "b")
        add(index, "c", seed=1)
        assert content(again) == content(index)
        assert counts(push(index, again)) == (0, 0, 0, 3)
    assert counts(pull(again, tmp_path / "copy")) == (3, 0, 0, 0)


def test_damaged_stores_are_errors_or_right(tmp_path: Path) -> None:
    tries, outcomes = settings.get_profile("fuzz").max_examples, []
    while len(outcomes) < tries:
        run = subprocess.run(
            [sys.executable, DAMAGE, tmp_path, str(len(outcomes)), str(tries)], capture_output=True, text=True
        )
        outcomes += run.stdout.splitlines()
        if run.returncode != 0:
            assert "non-unwinding panic" in run.stderr or "memory allocation of" in run.stderr, run.stderr
            outcomes.append("ended by Lance, which no code of ours can hold: docs/security.md says so")
    assert [line for line in outcomes if not line.startswith(("right ", "error ", "ended "))] == []
    assert any(line.startswith("error ") for line in outcomes)


def test_a_damaged_item_is_not_pushed(index: Index, store: LanceStore, tmp_path: Path) -> None:
    add(index, *names(3))
    (segment,) = (tmp_path / "index" / "segments").glob("*.safetensors")
    raw, row = segment.read_bytes(), index.embeddings[1].numpy().tobytes()
    segment.write_bytes(raw.replace(row, row[:-1] + bytes([row[-1] ^ 1])))
    with pytest.raises(StoreError, match=r"1 items of the index are damaged, such as 'photos/1.jpg', and were not"):
        push(index, store)
    assert len(store) == 0


def test_an_index_that_was_not_pulled_is_not_replaced(index: Index, store: LanceStore, tmp_path: Path) -> None:
    add(index, "only here")
    with pytest.raises(StoreError, match=r"expected a new folder or one that was pulled, got .* with 1 items"):
        pull(store, tmp_path / "index")
    assert "only here" in index


def test_an_id_that_is_there_twice_is_named(store: LanceStore, tmp_path: Path) -> None:
    import lance

    add(store, "a", "b")
    pull(store, tmp_path / "before")
    dataset = lance.dataset(store.uri)
    lance.write_dataset(dataset.to_table(filter="id = 'b'"), dataset, mode="append")  # past this class
    for folder in ("before", "new"):
        with pytest.raises(StoreError, match=r"'b' is in the store at .* twice"):
            pull(store, tmp_path / folder)
    store.delete(["b"])
    assert pull(store, tmp_path / "before")["removed"] == 1


# The commands -------------------------------------------------------------------------------------------------------------


def test_the_commands(index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def finelip(*arguments: object, code: int = 0) -> Any:
        assert main([*map(str, arguments), "--quiet", "--json"]) == code
        printed = capsys.readouterr()
        return printed.err if code else json.loads(printed.out)

    add(index, *names(9))
    uri, folder = tmp_path / "store", tmp_path / "index"
    arguments = ["--index", folder, "--storage-option", "region=nowhere", "--storage-option", "endpoint=http://a?b=c"]
    report = finelip("index", "push", uri, *arguments)
    assert report == {"added": 9, "replaced": 0, "removed": 0, "unchanged": 0, "version": 2}
    index.delete(names(2))
    assert finelip("index", "push", uri, "--index", folder, "--keep")["removed"] == 0
    assert finelip("index", "push", uri, "--index", folder)["removed"] == 2
    parts = [finelip("index", "pull", uri, "--index", tmp_path / n, "--part", f"{n}/2")["added"] for n in "01"]
    assert sum(parts) == 7
    assert pulled(tmp_path / "0") | pulled(tmp_path / "1") == content(index)
    assert finelip("index", "pull", uri, "--index", tmp_path / "old", "--version", 2)["added"] == 9
    assert "expected a new folder or one that was pulled" in finelip("index", "pull", uri, "--index", folder, code=2)
    assert "there is no store at" in finelip("index", "pull", tmp_path / "nothing", "--index", tmp_path / "x", code=2)
    for option, message in (
        ("--part=1", "expected --part to be I/N such as 0/4"),
        ("--storage-option=a", "expected --storage-option to be KEY=VALUE"),
    ):
        assert main(["index", "pull", str(uri), option]) == 2
        assert message in capsys.readouterr().err
