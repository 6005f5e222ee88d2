"""The index: a searchable list of items; in a folder, acknowledged changes persist."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finelip_fast.errors import InputError, StoreError
from finelip_fast.index import Index, IndexSpec, Written, restore, schema, stored_dtype, stored_index, stored_source
from finelip_fast.index.catalogue import Catalogue
from finelip_fast.index.duplicates import duplicates
from finelip_fast.index.segments import encode, write_segment
from finelip_fast.index.tune import sample_queries, tune
from finelip_fast.index.view import View

SPEC = IndexSpec(checkpoint="abc", tokens=3, width=8)


def embeddings(rows: int, seed: int = 0) -> Tensor:
    """Return unit rows rounded to float16, so that storing them loses nothing."""
    rows = torch.randn(rows, SPEC.tokens, SPEC.width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1).half().float()


def add(index: Index, *ids: str, seed: int = 0) -> None:
    index.add(ids, embeddings(len(ids), seed), [{"of": item} for item in ids])


@pytest.fixture(params=["memory", "folder"])
def open_index(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Index]]:
    """Return a function that opens an index in memory or in a folder; it is closed at the end."""
    opened: list[Index] = []

    def build() -> Index:
        opened.append(Index(SPEC, None if request.param == "memory" else tmp_path / "index"))
        return opened[-1]

    yield build
    for index in opened:
        index.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "index"


def contents(folder: Path) -> list[str]:
    with closing(Index(SPEC, folder)) as index:
        return index.ids


# Adding and searching -------------------------------------------------------------------------------------------------


def test_an_index_holds_what_was_added(open_index: Callable[[], Index]) -> None:
    index = open_index()
    assert len(index) == 0
    assert index.embeddings.shape == (0, 3, 8)
    add(index, "a", "b")
    add(index, "c", seed=1)
    assert len(index) == 3
    assert index.ids == ["a", "b", "c"]
    assert index.metadata == [{"of": "a"}, {"of": "b"}, {"of": "c"}]
    assert torch.equal(index.embeddings, torch.cat([embeddings(2), embeddings(1, seed=1)]).half())
    assert "b" in index
    assert "d" not in index


def test_a_folder_whose_name_is_not_utf8_is_an_index(tmp_path: Path) -> None:
    folder = tmp_path / "caf\udce9"
    with closing(Index(SPEC, folder)) as index:
        add(index, "a", "b")
        index.maintain()
        index.snapshot(tmp_path / "\udce9")
    for copied in (folder, tmp_path / "\udce9"):
        with closing(Index(SPEC, copied)) as index:
            assert [item.id for item in index.search(embeddings(2)[1:], 2).items[0]] == ["b", "a"]


def test_adding_nothing_is_nothing(open_index: Callable[[], Index]) -> None:
    index = open_index()
    index.add([], torch.empty(0, 3, 8), [])
    assert len(index) == 0


def test_skipping_everything_changes_nothing(open_index: Callable[[], Index]) -> None:
    index = open_index()
    add(index, "a", "b")
    version, view = index.version, index._store.view()
    assert index.add(["b", "a"], embeddings(2, 1), [{}, {}], existing="skip") == []
    assert index.version == version
    assert index._store.view() is view
    assert index.add(["b", "c"], embeddings(2, 1), [{}, {}], existing="skip") == ["c"]
    assert index.version == version + 1


@pytest.mark.parametrize("k", [1, 3, 5, 50])
@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.0])
def test_search_agrees_with_scoring_everything(method: ModuleType, k: int, alpha: float) -> None:
    index = Index(SPEC)
    for block in range(3):  # in blocks, in order of insertion
        index.add([f"{block}-{n}" for n in range(4)], embeddings(4, block), [{}] * 4)
    queries = embeddings(2, seed=9)
    results = index.search(queries, k, alpha=alpha)
    queries, items = queries.double().numpy(), index.embeddings.double().numpy()
    expected = method.score_matrix(queries, items, alpha)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :k]
    assert results.numbers.tolist() == order.tolist()
    assert [[item.id for item in items] for items in results.items] == [[index.ids[n] for n in row] for row in order]
    parts = (method.score_matrix(queries, items, 1.0), method.score_matrix(queries, items, 0.0))
    for mine, right in zip(
        (results.scores, results.global_scores, results.fine_scores), (expected, *parts), strict=True
    ):
        torch.testing.assert_close(
            mine, torch.from_numpy(np.take_along_axis(right, order, 1)).float(), atol=1e-5, rtol=0
        )


def test_ties_come_in_order_of_insertion(open_index: Callable[[], Index]) -> None:
    index = open_index()
    rows = torch.eye(8)[None, :3]  # exact in any arithmetic
    for name in "hgfedcba":
        index.add([name], rows, [{}])
    for mode in ("exact", "exact-int8", "two-stage"):
        assert index.search(rows, 5, mode=mode).numbers.tolist() == [[0, 1, 2, 3, 4]]


def test_searching_an_empty_index_finds_nothing(open_index: Callable[[], Index]) -> None:
    index = open_index()
    for mode in ("auto", "exact", "exact-int8", "two-stage"):
        results = index.search(embeddings(2), 5, mode=mode)
        assert results.scores.shape == results.fine_scores.shape == results.numbers.shape == (2, 0)
        assert results.items == [[], []]
    add(index, "a")
    index.delete(["a"])
    assert index.search(embeddings(2), 5).items == [[], []]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["new", "old"], "the index already has 'old'; pass other ids"),
        (["new", "twice", "twice"], "expected unique ids, got 'twice' twice"),
        (["new", 7], "expected ids of type str, got 7"),
    ],
)
def test_ids_must_be_new_strings(open_index: Callable[[], Index], ids: list, message: str) -> None:
    index = open_index()
    add(index, "old")
    with pytest.raises(InputError, match=message):
        index.add(ids, embeddings(len(ids)), [{}] * len(ids))
    assert index.ids == ["old"]
    add(index, "new")


@pytest.mark.parametrize(
    ("shape", "metadata"),
    [((2, 3, 8), 1), ((1, 2, 8), 1), ((1, 3, 4), 1), ((1, 3, 8), 2)],
    ids=["rows", "tokens", "width", "metadata"],
)
def test_embeddings_must_fit(open_index: Callable[[], Index], shape: tuple[int, ...], metadata: int) -> None:
    index = open_index()
    with pytest.raises(InputError, match=r"expected (embeddings as a tensor \[1, 3, 8\]|metadata for 1 ids), got"):
        index.add(["a"], torch.zeros(shape), [{}] * metadata)
    assert len(index) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ids": None}, "expected ids to be a list, got None"),
        ({"ids": "a"}, r"expected ids to be a list, got the str 'a'; pass \['a'\]"),
        ({"ids": 3}, "expected ids to be a list, got 3"),
        ({"embeddings": None}, "expected embeddings as a tensor or an array .*, got None"),
        ({"embeddings": [[[0.0]]]}, r"expected embeddings as a tensor or an array .*, got \[\[\[0.0\]\]\]"),
        ({"embeddings": torch.ones(1, 3, 8).to_sparse()}, r"expected embeddings as a dense tensor, .*\.to_dense\(\)"),
        ({"metadata": None}, "expected metadata to be a list, got None"),
        ({"metadata": {}}, "expected metadata to be a list, got {}"),
        ({"metadata": [{}, {}]}, "expected metadata for 1 ids, got 2"),
        ({"existing": ["skip"]}, r"expected existing to be one of error, skip, replace, got \['skip'\]"),
    ],
    ids=str,
)
def test_what_is_added_is_of_the_right_kind(open_index: Callable[[], Index], changed: dict, message: str) -> None:
    index = open_index()
    with pytest.raises(InputError, match=message):
        index.add(**{"ids": ["a"], "embeddings": embeddings(1), "metadata": [{}], **changed})
    with pytest.raises(InputError, match="expected ids to be a list, got 3"):
        index.delete(3)  # type: ignore[arg-type]
    assert len(index) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"spec": "abc"}, "expected an IndexSpec and source as str, got 'abc'"),
        ({"source": None}, "expected an IndexSpec and source as str, got .* and None"),
        ({"folder": 3}, "expected folder to be a path, got 3"),
        ({"folder": ""}, "expected folder to be a path, got ''; the working folder is '.'"),
        ({"folder": "index", "version": "1"}, "expected version to be an integer, got '1'"),
        ({"device": "gpu"}, "device='gpu' cannot be used: .*; use device='cpu'"),
    ],
    ids=str,
)
def test_an_index_is_opened_with_arguments_of_the_right_kind(changed: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Index(**{"spec": SPEC, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"checkpoint": None}, "expected checkpoint as a fingerprint, got None"),
        ({"tokens": 0}, "expected tokens of at least 1, got 0"),
        ({"width": "8"}, "expected width to be an integer, got '8'"),
        ({"alpha": None}, r"expected alpha in \[0, 1\], got None"),
    ],
    ids=str,
)
def test_a_spec_has_values_of_the_right_kind(changed: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        IndexSpec(**{"checkpoint": "abc", "tokens": 3, "width": 8, **changed})


def test_an_index_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with closing(Index(SPEC, "index")) as index:
        add(index, "a")
        monkeypatch.chdir("elsewhere")
        add(index, "b", seed=1)
        with closing(pickle.loads(pickle.dumps(index))) as again:
            assert again.ids == ["a", "b"]
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "metadata", [{"path": Path("a")}, {"set": {1}}, {(1, 2): 3}, ["list"], None, {"nan": float("nan")}], ids=repr
)
def test_metadata_must_be_json(open_index: Callable[[], Index], metadata: object) -> None:
    index = open_index()
    with pytest.raises(InputError, match="expected metadata "):
        index.add(["a", "b"], embeddings(2), [{}, metadata])
    assert len(index) == 0


def test_metadata_is_a_copy_and_reads_alike_before_and_after_closing(folder: Path) -> None:
    metadata = {"size": (640, 480), "1": ["x"]}
    with closing(Index(SPEC, folder)) as index:
        index.add(["a"], embeddings(1), [metadata])
        metadata["1"].append("changed later")
        before = index.metadata
    with closing(Index(SPEC, folder)) as index:
        assert index.metadata == before == [{"size": [640, 480], "1": ["x"]}]


CIRCLE: dict = {}
CIRCLE["x"] = CIRCLE


@pytest.mark.parametrize(
    ("metadata", "fault"),
    [
        ({1: 0, "1": 1}, r"expected metadata with str keys, got the key 1 \(item 'b'\)"),
        ({"a": {"b": {(1,): 0}}}, r"the key \(1,\) under the key 'a'"),
        ({"a": [float("inf")]}, "expected metadata with finite numbers, got inf under the key 'a'"),
        ({"a": 10**400}, "numbers that a float can hold, got a larger integer under the key 'a'"),
        ({"a": Path("x" * 999)}, r"got PosixPath\('x+ under the key 'a' \(item 'b'\); convert it, such as"),
        (CIRCLE, "expected metadata nested at most 64 deep, got deeper nesting"),
    ],
    ids=["both", "deep", "infinite", "huge", "object", "circle"],
)
def test_what_json_cannot_hold_is_named(open_index: Callable[[], Index], metadata: dict, fault: str) -> None:
    index = open_index()
    with pytest.raises(InputError, match=fault) as caught:
        index.add(["a", "b"], embeddings(2), [{}, metadata])
    assert len(str(caught.value)) < 400
    assert len(index) == 0


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (float("nan"), r"expected finite embeddings, got NaN \(item 'b', row 2\); check how"),
        (float("inf"), r"expected finite embeddings, got infinity \(item 'b', row 2\); check how"),
        (0.0, r"expected rows of length 1, got 0 \(item 'b', row 2\); normalize them"),
        (1.0, r"expected rows of length 1, got 2.828 \(item 'b', row 2\); normalize them"),
    ],
    ids=str,
)
def test_rows_that_are_no_unit_rows_are_refused(open_index: Callable[[], Index], value: float, fault: str) -> None:
    index, rows = open_index(), embeddings(3)
    rows[1, 2] = value
    with pytest.raises(InputError, match=fault):
        index.add(["a", "b", "c"], rows, [{}] * 3)
    assert len(index) == 0
    with pytest.raises(InputError, match=r"expected embeddings of floating-point numbers, got torch\.int64"):
        index.add(["a"], torch.ones(1, 3, 8, dtype=torch.int64), [{}])


@pytest.mark.parametrize("convert", [Tensor.double, Tensor.numpy, lambda rows: rows.double().numpy()])
def test_embeddings_may_be_arrays_or_float64(open_index: Callable[[], Index], convert: Callable[[Tensor], Any]) -> None:
    index = open_index()
    assert index.add(np.array(["a", "b"]), convert(embeddings(2)), [{}] * 2) == ["a", "b"]
    assert torch.equal(index.embeddings, embeddings(2).half())
    assert index.search(convert(embeddings(2)), 1).numbers.tolist() == [[0], [1]]


def test_embeddings_with_gradients_are_stored_without(open_index: Callable[[], Index]) -> None:
    index, rows = open_index(), embeddings(2).requires_grad_()
    index.add(["a", "b"], rows, [{}] * 2)
    assert index.search(rows, 1).numbers.tolist() == [[0], [1]]
    assert not index.embeddings.requires_grad


def test_ids_come_back_as_pythons_strings(open_index: Callable[[], Index]) -> None:
    assert {type(item) for item in open_index().add(np.array(["a", "b"]), embeddings(2), [{}] * 2)} == {str}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda index: setattr(index, "root", None), "expected root to be a path, got None"),
        (lambda index: setattr(index, "tuning", {"a": 1}), "expected tuning as the result of .*, got {'a': 1}"),
        (lambda index: index.speed_up(3), "expected a field of the metadata, by its name, got 3"),
        (lambda index: stored_index(None), "expected folder to be a path, got None"),
        (lambda index: stored_dtype(3), "expected folder to be a path, got 3"),
        (lambda index: restore(None), "expected folder to be a path, got None"),
    ],
)
def test_other_kinds_are_refused_by_name(call: Callable[[Index], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(Index(SPEC))


def test_there_is_nothing_to_restore_without_an_index(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no index at .*nothing: check"):
        restore(tmp_path / "nothing")


def test_an_id_may_be_any_text_that_is_not_too_long(open_index: Callable[[], Index]) -> None:
    index = open_index()
    ids = ["", "nul\0byte", "\ud800", "\n", "é" * 32_767]
    index.add(ids, embeddings(5), [{}] * 5)
    assert index.ids == ids
    for long in ("x" * 65_536, "é" * 32_768):
        with pytest.raises(InputError, match="expected ids of at most 65535 bytes, got one of") as caught:
            index.add([long], embeddings(1), [{}])
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": True}, "expected k to be an integer, got True"),
        ({"k": 0}, "expected k of at least 1, got 0"),
        ({"k": "3"}, "expected k to be an integer, got '3'"),
        ({"k": 2.5}, "expected k to be an integer, got 2.5"),
        ({"candidates": True}, "expected candidates to be an integer, got True"),
        ({"candidates": -1}, "expected candidates of at least 1, got -1"),
        ({"alpha": "x"}, r"expected alpha in \[0, 1\], got 'x'"),
        ({"alpha": float("nan")}, r"expected alpha in \[0, 1\], got nan"),
        ({"alpha": 2}, r"expected alpha in \[0, 1\], got 2"),
        ({"alpha": True}, r"expected alpha in \[0, 1\], got True"),
        ({"mode": None}, "expected mode to be one of"),
        ({"where": 3}, "expected a where expression as a str, got int"),
        ({"queries": torch.full((1, 3, 8), torch.nan)}, r"expected finite queries, got NaN \(query 0, row 0\)"),
        ({"queries": 5 * embeddings(2)}, r"expected rows of length 1, got 5\.001 \(query 0, row 0\); normalize them"),
        ({"queries": embeddings(1).int()}, r"expected queries of floating-point numbers, got torch\.int32"),
        ({"queries": embeddings(1)[:, :0]}, r"expected queries \[Q, L, 8\] of one row or more, got \[1, 0, 8\]"),
        ({"queries": torch.ones(1, 3, 7)}, r"expected queries \[Q, L, 8\], got \[1, 3, 7\]"),
        ({"queries": [1]}, r"expected queries as a tensor or an array \[N, L, D\], got \[1\]"),
    ],
    ids=str,
)
def test_a_search_refuses_what_is_no_number(options: dict, message: str) -> None:
    index = Index(SPEC)
    add(index, "a")
    with pytest.raises(InputError, match=message):
        index.search(**({"queries": embeddings(1), "k": 1} | options))


# Keeping --------------------------------------------------------------------------------------------------------------


def test_a_folder_keeps_everything(folder: Path) -> None:
    query = embeddings(1, seed=2)
    with closing(Index(SPEC, folder, source="somewhere")) as index:
        add(index, "a", "b")
        add(index, "c", seed=1)
        before = (index.ids, index.metadata, index.embeddings, index.search(query, 3))
    with closing(Index(SPEC, folder)) as index:
        ids, metadata, rows, results = before
        assert (index.ids, index.metadata) == (ids, metadata)
        assert torch.equal(index.embeddings, rows)
        assert torch.equal(index.search(query, 3).scores, results.scores)
        assert index.search(query, 3).items == results.items
        add(index, "d", seed=3)
    assert contents(folder) == ["a", "b", "c", "d"]
    assert stored_source(folder) == "somewhere"


def test_a_closed_index_says_so(open_index: Callable[[], Index]) -> None:
    index = open_index()
    add(index, "a")
    index.close()
    index.close()
    remedy = "open its folder again" if index.folder else "its items were in memory, and went with it"
    uses = (lambda: add(index, "b"), lambda: index.search(embeddings(1), 1), lambda: len(index), index.maintain)
    properties = (lambda: index.damaged, lambda: index.incoming, lambda: index.tuning, lambda: index.root)
    for use in (*uses, *properties, index.check, index.lost, lambda: index.delete([]), index.__enter__):
        with pytest.raises(StoreError, match=f"the index is closed: {remedy}"):
            use()


def test_the_stored_source_tells_the_bundled_model_from_no_index(folder: Path) -> None:
    assert stored_source(folder) is None
    Index(SPEC, folder, source="").close()
    assert stored_source(folder) == ""


def test_a_process_killed_before_the_commit_loses_nothing_acknowledged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with closing(Index(SPEC, folder)) as index:
        add(index, "kept")
        with monkeypatch.context() as patch:
            patch.setattr(Catalogue, "add", killed)
            with pytest.raises(KeyboardInterrupt):
                add(index, "lost", seed=1)
        assert index.ids == ["kept"]
    assert len(list((folder / "segments").glob("*.safetensors"))) == 2  # nothing refers to the second
    with closing(Index(SPEC, folder)) as index:
        assert index.ids == ["kept"]
        add(index, "lost", seed=1)
    with closing(Index(SPEC, folder)) as index:
        assert index.ids == ["kept", "lost"]
        assert torch.equal(index.embeddings[1:], embeddings(1, seed=1).half())


def test_two_writers_and_a_reader_see_each_other(folder: Path) -> None:
    with closing(Index(SPEC, folder)) as first, closing(Index(SPEC, folder)) as second:
        add(first, "from the first")
        assert second.ids == ["from the first"]
        add(second, "from the second", seed=1)
        second.delete(["from the first"])
        assert first.ids == ["from the second"]
        assert [item.id for item in first.search(embeddings(1), 5).items[0]] == ["from the second"]
        with pytest.raises(InputError, match="already has 'from the second'"):
            add(first, "from the second")
        first.maintain()
        assert second.ids == ["from the second"]
        assert second.version == first.version == 4
    assert contents(folder) == ["from the second"]


def test_a_search_that_others_disturb_is_done_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process compacts the index after the search has chosen its rows, or before it reads them."""
    with closing(Index(SPEC, folder)) as writer, closing(Index(SPEC, folder)) as reader:
        for number in range(4):
            add(writer, f"item {number}", seed=number)
        expected = reader.search(embeddings(1, seed=3), 3).items
        assert expected[0][0].id == "item 3"
        disturbed = []

        def compacted(*arguments: object) -> object:
            if len(disturbed) < 2:
                disturbed.append(1)
                writer.delete([f"item {len(disturbed) - 1}"])
                writer.maintain()
            return original(*arguments)

        for name in ("at", "layout"):
            original = getattr(reader._store.catalogue, name)
            monkeypatch.setattr(reader._store.catalogue, name, compacted)
            hits = reader.search(embeddings(1, seed=3), 3, mode="two-stage").items
            assert hits[0][0].id == "item 3"
            monkeypatch.undo()
        assert {item.id for item in hits[0]} == {"item 2", "item 3"}


def build_candidates(index: Index) -> None:
    pytest.importorskip("faiss")
    index.build_candidates(lists=1, progress=False)


@pytest.mark.parametrize(
    "use",
    [
        lambda index: index.embeddings,
        lambda index: index.embeddings_of(["a"]),
        lambda index: index.relabel(["a"], ["c"], [{}]),
        build_candidates,
        lambda index: duplicates(index, similarity=0.9),
        sample_queries,
        lambda index: tune(index, embeddings(1), k=1, candidates=[1], progress=False),
        Index.build_sketches,
        Index.maintain,
        lambda index: index.search(embeddings(1), 1),
    ],
)
def test_a_segment_that_has_become_shorter_is_not_read(folder: Path, use: Callable[[Index], object]) -> None:
    """The system would end the process if the segment were larger than a page of memory."""
    with closing(Index(SPEC, folder)) as index:
        add(index, "a", "b")
        add(index, "c", seed=1)
        index.delete(["c"])
        for file in (folder / "segments").glob("*.safetensors"):
            os.truncate(file, file.stat().st_size - 50)
        with pytest.raises(StoreError, match=r"segment .* (has changed in size|cannot be read)|items are damaged"):
            use(index)
        assert index.ids == ["a", "b"]


@pytest.mark.parametrize(
    "measure",
    [
        sample_queries,
        lambda index: tune(index, embeddings(2, seed=3), answers=["a", "b"], k=1, candidates=[1], progress=False),
        Index.build_sketches,
    ],
    ids=["sample", "tune", "sketch"],
)
def test_what_another_process_compacts_meanwhile_is_measured_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, measure: Callable[[Index], object]
) -> None:
    with closing(Index(SPEC, folder)) as writer, closing(Index(SPEC, folder)) as index:
        add(writer, "a", "b", seed=1)
        add(writer, "c", seed=2)
        read_rows = View.read
        disturbed = []

        def compacted(*arguments: Any) -> Tensor:
            if not disturbed:
                disturbed.append(True)
                writer.maintain()
            return read_rows(*arguments)

        monkeypatch.setattr(View, "read", compacted)
        assert measure(index) is not None
        assert disturbed
        monkeypatch.undo()
        next(iter((folder / "segments").glob("*.safetensors"))).unlink()
        with pytest.raises(StoreError, match="is missing; restore it"):
            sample_queries(index)


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-9])])
def test_a_damaged_segment_is_named(folder: Path, damage: Callable[[Path], object]) -> None:
    with closing(Index(SPEC, folder)) as index:
        add(index, "a", "b")
    (segment,) = (folder / "segments").glob("*.safetensors")
    damage(segment)
    with pytest.raises(StoreError, match=rf"{segment.name}.*(restore it|finelip index repair)"):
        Index(SPEC, folder)


@pytest.mark.parametrize("where", ["index", "index/below"], ids=["itself", "its parent"])
def test_a_file_in_the_folders_place_is_refused(folder: Path, where: str) -> None:
    folder.write_text("in the way")
    with pytest.raises(StoreError, match=r"cannot make the index folder .*index"):
        Index(SPEC, folder.parent / where)
    assert stored_source(folder) is None
    assert folder.read_text() == "in the way"


def test_a_catalogue_that_is_a_folder_is_refused(folder: Path) -> None:
    (folder / "catalogue.sqlite").mkdir(parents=True)
    for attempt in (lambda: Index(SPEC, folder), lambda: stored_source(folder)):
        with pytest.raises(StoreError, match=r"catalogue\.sqlite cannot be opened as an index catalogue"):
            attempt()


# Taking out, replacing, taking over ----------------------------------------------------------------------------------


def test_what_was_taken_out_is_not_found(open_index: Callable[[], Index]) -> None:
    index = open_index()
    add(index, "a", "b", "c")
    index.delete(["b", "b"])
    assert index.ids == ["a", "c"]
    assert "b" not in index
    assert torch.equal(index.embeddings, embeddings(3).half()[[0, 2]])
    index.delete([])
    add(index, "b", seed=1)  # the id is available again
    assert index.ids == ["a", "c", "b"]


def test_taking_out_what_is_not_there_takes_out_nothing(open_index: Callable[[], Index]) -> None:
    index = open_index()
    add(index, "a")
    with pytest.raises(InputError, match=r"not in the index: 'x' and 1 other; finelip list"):
        index.delete(["a", "x", "y"])
    assert index.ids == ["a"]


def test_an_item_in_the_place_of_another(open_index: Callable[[], Index]) -> None:
    index = open_index()
    add(index, "a", "b")
    index.upsert(["c", "a"], embeddings(2, seed=5), [{"new": 1}, {"new": 2}])
    assert index.ids == ["b", "c", "a"]
    assert index.metadata == [{"of": "b"}, {"new": 1}, {"new": 2}]
    assert torch.equal(index.embeddings[1:], embeddings(2, seed=5).half())
    with pytest.raises(InputError, match="expected unique ids"):
        index.upsert(["a", "a"], embeddings(2), [{}, {}])


def test_what_workers_wrote_is_taken_over_at_once(folder: Path) -> None:
    def work(index: Index, *ids: str, seed: int) -> Written:
        name, crcs = write_segment(index.incoming, encode(embeddings(len(ids), seed), SPEC.dtype))
        return Written(name, list(ids), crcs, [{"of": item} for item in ids])

    with closing(Index(SPEC, folder)) as index:
        add(index, "a")
        segments = [work(index, "b", "c", seed=1), work(index, "d", seed=2)]
        index.maintain()  # does not touch them
        index.adopt(segments)
        assert index.ids == ["a", "b", "c", "d"]
        assert torch.equal(index.embeddings[3:], embeddings(1, 2).half())
        assert list(index.incoming.iterdir()) == []
        for again in (segments[:1], [work(index, "d", seed=3)], [work(index, "e", seed=3), work(index, "e", seed=3)]):
            with pytest.raises((InputError, StoreError), match=r"already has '[de]'|got '[de]' twice|already has 'b'"):
                index.adopt(again)
        short = work(index, "f", seed=4)
        for segment, message in [
            (short._replace(ids=["f", "g"], crcs=[1, 2], metadata=[{}, {}]), r"expected tokens float16 \[2, 3, 8\]"),
            (short._replace(name="lost.safetensors", ids=["g"]), "cannot take over .*lost.safetensors"),
        ]:
            with pytest.raises(StoreError, match=message):
                index.adopt([short, segment] if segment.name != short.name else [segment])
        assert index.ids == ["a", "b", "c", "d"]
        index.adopt([short])
        index.delete(["f"])
        assert index.check() == {}
        left = set(index.incoming.iterdir())
        for path in left:
            os.utime(path, (0, 0))
        index.maintain()
        assert set(index.incoming.iterdir()) == left  # an old time does not prove that they are abandoned
    with pytest.raises(InputError, match="got one in memory"):
        Index(SPEC).adopt([])


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.sampled_from(["reopen", "maintain"]),
            st.tuples(st.sampled_from(["add", "upsert", "delete"]), st.sets(st.integers(0, 7), max_size=4)),
        ),
        max_size=10,
    ),
    k=st.integers(1, 12),
    alpha=st.sampled_from([0.0, 0.8, 1.0]),
)
def test_any_sequence_of_changes_is_a_dictionary(
    method: ModuleType, steps: list[str | tuple[str, set[int]]], k: int, alpha: float
) -> None:
    model: dict[str, tuple[Tensor, dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        index = Index(SPEC, folder)
        for number, step in enumerate(steps):
            if step == "reopen":
                index.close()
                index = Index(SPEC, folder)
            elif step == "maintain":
                index.maintain()
            else:
                kind, chosen = step
                ids = [f"item {item}" for item in sorted(chosen)]
                if kind == "delete":
                    ids = [item for item in ids if item in model]
                    index.delete(ids)
                    model = {item: value for item, value in model.items() if item not in ids}
                    continue
                if kind == "add":
                    ids = [item for item in ids if item not in model]
                block, metadata = embeddings(len(ids), seed=number), [{"step": number}] * len(ids)
                (index.add if kind == "add" else index.upsert)(ids, block, metadata)
                model = {item: value for item, value in model.items() if item not in ids}
                model |= {item: (row, meta) for item, row, meta in zip(ids, block, metadata, strict=True)}
        assert index.ids == list(model)
        assert index.metadata == [meta for _, meta in model.values()]
        rows = torch.stack([row for row, _ in model.values()]) if model else embeddings(0)
        assert torch.equal(index.embeddings, rows.half())
        assert index.check() == {}
        query = embeddings(1, seed=99)
        searches = [index.search(query, k, alpha=alpha, mode=mode) for mode in ("exact", "exact-int8")]
        everything = index.search(query, k, alpha=alpha, mode="two-stage", candidates=50)
        index.close()
    expected = method.score_matrix(query.double().numpy(), rows.double().numpy(), alpha)[0]
    for results in (*searches, everything):
        assert results.numbers[0].tolist() == np.argsort(-expected, kind="stable")[:k].tolist()
        np.testing.assert_allclose(results.scores[0].numpy(), np.sort(expected)[::-1][:k], atol=1e-5)


# What users meet -------------------------------------------------------------------------------------------------------


def test_an_empty_segment_of_a_worker_adds_nothing(folder: Path) -> None:
    with closing(Index(SPEC, folder)) as index:
        add(index, "a")
        version = index.version
        name, crcs = write_segment(index.incoming, encode(embeddings(0), "float16"))
        index.adopt([Written(name, [], crcs, [])])
        assert (index.version, list(index.incoming.iterdir())) == (version, [])
        index.adopt([])
        assert index.version == version
        with pytest.raises(InputError, match="expected checksums and metadata for 1 ids"):
            index.adopt([Written(name, ["b"], [], [{}])])
        with pytest.raises(StoreError, match="expected a file name"):
            index.adopt([Written("../catalogue.sqlite", [], [], [])])
    with closing(Index(SPEC, folder)) as index:
        assert index.ids == ["a"]


def test_the_public_names_are_what_a_user_needs() -> None:
    with Index(SPEC) as index:
        names = {name for name in dir(index) if not name.startswith("_")}
    assert names == {
        *("spec", "source", "device", "folder", "version", "tuning", "damaged", "total"),
        *(
            "items",
            "page",
            "get",
            "ids",
            "metadata",
            "fields",
            "embeddings",
            "embeddings_of",
            "present",
            "search",
            "root",
        ),
        *("add", "upsert", "relabel", "delete", "incoming", "adopt", "undisturbed", "close"),
        *("check", "repair", "maintain", "compact_recent", "lost", "snapshot", "speed_up", "build_candidates"),
        *("build_sketches", "sketch_bits"),
    }


def test_an_index_says_what_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "an\nindex"
    with Index(SPEC, folder) as index:
        index.add(["a", "b"], embeddings(2), [{}, {}])
        size = f"[{SPEC.tokens}, {SPEC.width}] {SPEC.dtype}"
        assert repr(index) == f"<Index in {str(folder)!r}: 2 items, {size}>"
    assert repr(index) == f"<Index in {str(folder)!r}: closed, {size}>"
    assert repr(Index(SPEC)) == f"<Index in memory: 0 items, {size}>"


def test_with_closes_it_also_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Index(SPEC, tmp_path / "index") as index:
        raise KeyError
    with pytest.raises(StoreError, match="the index is closed"):
        index.ids  # noqa: B018


def test_present_tells_which_ids_are_there() -> None:
    index = Index(SPEC)
    index.add(["a", "b"], embeddings(2), [{}, {}])
    assert index.present(["b", "c", "a", "a"]) == {"a", "b"}
    with pytest.raises(InputError, match="expected ids of type str, got 5"):
        index.present(["a", 5])


def test_an_older_version_knows_its_items_by_id(folder: Path) -> None:
    rows = embeddings(3)
    with closing(Index(SPEC, folder)) as index:
        index.add(["a", "b"], rows[:2], [{"n": 1}, {"n": 2}])
        version = index.version
        index.delete(["a"])
        index.upsert(["b"], rows[2:], [{"n": 3}])
        index.add(["c"], rows[2:], [{}])
        index.add(["a"], rows[2:], [{"n": 4}])
        ids = ["a", "b", "c"]
        with closing(Index(SPEC, folder, version=version)) as old:
            assert [item in old for item in ids] == [True, True, False]
            assert old.present(ids) == {"a", "b"}
            assert {item.id: item.metadata for item in old.get(ids).values()} == {"a": {"n": 1}, "b": {"n": 2}}
            assert torch.equal(torch.stack([*old.embeddings_of(ids).values()]).half(), old.embeddings)
            index.maintain()
            for call in (old.get, old.present, old.embeddings_of, old.__contains__):
                with pytest.raises(StoreError, match="expected version from"):
                    call("a" if call == old.__contains__ else ids)
        assert [item.metadata for item in index.get(ids).values()] == [{"n": 3}, {}, {"n": 4}]


def test_an_index_with_too_many_fields_to_speed_up_is_not_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "_MOST_FIELDS", 2)
    with closing(Index(SPEC, folder)) as index:
        index.add(["a", "b"], embeddings(2), [{"x": 1, "z": 1}, {"x": 2, "z": 2}])
        index.speed_up("x")
        index.speed_up("y")
        with pytest.raises(InputError, match=r"expected at most 2 fields to speed up.* filters can compare this field"):
            index.speed_up("z")
        index.speed_up("x")  # is there
    with closing(Index(SPEC, folder)) as index:
        assert [item.id for item in index.items(where="z = 2 and x = 2")] == ["b"]


def test_items_get_other_ids_and_keep_their_embeddings(open_index: Callable[[], Index]) -> None:
    index = open_index()
    add(index, "a", "b")
    add(index, "c", "d", seed=1)
    before = dict(zip(index.ids, index.embeddings, strict=True))
    index.relabel(["d", "a", "b"], ["e", "a", "d"], [{"was": name} for name in "dab"])
    assert index.ids == ["c", "e", "a", "d"]
    assert index.metadata == [{"of": "c"}, {"was": "d"}, {"was": "a"}, {"was": "b"}]
    assert torch.equal(index.embeddings, torch.stack([before[name] for name in "cdab"]))
    assert index.get(["a", "b", "d"]).keys() == {"a", "d"}
    assert index.get(["d"])["d"].metadata == {"was": "b"}
    assert not index.check()


def test_relabelling_is_all_or_nothing(open_index: Callable[[], Index]) -> None:
    index = open_index()
    add(index, "a", "b", "c")
    for ids, new_ids, metadata, message in (
        (["a", "z"], ["d", "e"], [{}, {}], "not in the index: 'z'"),
        (["a", "b"], ["d", "c"], [{}, {}], "the index already has 'c'; pass other new_ids"),
        (["a", "b"], ["d", "d"], [{}, {}], "expected unique ids, got 'd' twice"),
        (["a"], ["d"], [{"x": float("nan")}], "finite numbers, got nan"),
        (["a"], ["d", "e"], [{}], "expected new ids and metadata for 1 ids, got 2 and 1"),
    ):
        with pytest.raises(InputError, match=message):
            index.relabel(ids, new_ids, metadata)
    assert index.ids == ["a", "b", "c"]


def test_a_damaged_item_is_not_relabelled(folder: Path) -> None:
    with closing(Index(SPEC, folder)) as index:
        add(index, "a", "b")
    (path,) = (folder / "segments").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[content.index(embeddings(2)[1].half().numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with closing(Index(SPEC, folder)) as index:
        index.relabel(["a"], ["c"], [{}])
        with pytest.raises(StoreError, match="item 'b' is damaged"):
            index.relabel(["b"], ["d"], [{}])
        assert index.ids == ["b", "c"]


def test_an_index_remembers_its_root(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with closing(Index(SPEC, folder)) as index:
        assert index.root is None
        index.root = "photos"
    with closing(Index(SPEC, folder)) as index:
        assert index.root == (tmp_path / "photos").resolve()
