"""Pages of a listing: together they are the complete listing, whatever changes between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finelip_fast.errors import FineLIPError, InputError, StoreError
from finelip_fast.index import Index, IndexSpec
from finelip_fast.index.pages import Cursor

SPEC = IndexSpec(checkpoint="abc", tokens=3, width=8)


def embeddings(rows: int) -> Tensor:
    values = torch.randn(rows, SPEC.tokens, SPEC.width, generator=torch.Generator().manual_seed(rows))
    return torch.nn.functional.normalize(values, dim=-1)


def add(index: Index, *ids: str, existing: str = "error") -> None:
    index.add(ids, embeddings(len(ids)), [{"even": at % 2 == 0} for at in range(len(ids))], existing=existing)


@pytest.fixture(params=["memory", "folder"])
def index(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Index]:
    with Index(SPEC, None if request.param == "memory" else tmp_path / "index") as index:
        yield index


def listed(index: Index, between: Callable[[int], object] = lambda page: None, **options: object) -> list[str]:
    """Return the ids of all pages; ``between`` is called with the number of each page except the last."""
    ids, after, number = [], None, 0
    while True:
        items, after = index.page(after=after, **options)
        ids += [item.id for item in items]
        if after is None:
            return ids
        assert items
        between(number)
        number += 1


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 100])
def test_pages_are_the_listing(index: Index, limit: int) -> None:
    assert listed(index, limit=limit) == []
    add(index, *"abcd")
    add(index, "ü/\udcff", "'", "")
    index.delete(["b"])
    assert listed(index, limit=limit) == index.ids
    even = [item.id for item in index.items(where="even = true")]
    assert listed(index, limit=limit, where="even = true") == even == ["a", "c", "ü/\udcff", ""]


def test_what_changes_between_pages_is_neither_skipped_nor_told_twice(index: Index) -> None:
    add(index, *"abcdefgh")

    def change(page: int) -> None:
        if page == 0:
            index.delete(["b", "d"])  # the last item of this page, and a later one
            add(index, "i")
        if page == 1:
            add(index, "g", existing="replace")

    assert listed(index, change, limit=2) == ["a", "b", "c", "e", "f", "h", "i", "g"]


def test_pages_go_on_after_a_compaction(tmp_path: Path) -> None:
    with Index(SPEC, tmp_path / "index") as index:
        add(index, *"abcdefgh")
        add(index, "i", "j")

        def compact(page: int) -> None:
            if page == 1:
                index.delete(["a", "c", "e"])
                index.maintain()

        assert listed(index, compact, limit=2) == [*"abcdfghij"]


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_page_whose_place_is_lost_says_so(tmp_path: Path, comes_back: bool) -> None:
    with Index(SPEC, tmp_path / "index") as index:
        add(index, *"abcdefgh")
        _, after = index.page(limit=3)
        index.delete(["c"])
        index.maintain()
        if comes_back:
            add(index, "c")
        with pytest.raises(
            InputError, match=r"last item of the page before after was deleted.*list from the beginning"
        ):
            index.page(after=after)


def test_a_long_id_makes_no_long_cursor(index: Index) -> None:
    add(index, "x" * 5000, "y" * 5000, "z")
    _, after = index.page(limit=1)
    assert len(after) < 100
    assert listed(index, limit=1) == index.ids


def test_an_older_version_is_listed_as_it_was(tmp_path: Path) -> None:
    with Index(SPEC, tmp_path / "index") as index:
        add(index, *"abc")
        version = index.version
        index.delete(["b"])
        add(index, "d")
        with Index(SPEC, tmp_path / "index", version=version) as old:
            assert listed(old, limit=1) == [*"abc"]


@pytest.mark.parametrize("wrong", ["", "x", "1.2", "1.2.$", "-1.0.YQ", "1" * 40 + ".0.YQ", 5, "0.0.A"])
def test_what_no_page_gave_is_refused(index: Index, wrong: object) -> None:
    with pytest.raises(InputError, match="expected after to be the cursor of a previous page"):
        index.page(after=wrong)
    with pytest.raises(InputError, match="expected limit of at least 1"):
        index.page(limit=0)
    with pytest.raises(InputError, match="of the where expression"):
        index.page(where="=")


@settings(settings.get_profile("fuzz"))
@given(text=st.from_regex(r"[0-9]{1,15}\.[0-9]{1,15}\.[A-Za-z0-9_-]{0,20}", fullmatch=True) | st.text(max_size=30))
def test_any_cursor_is_a_page_or_our_error(text: str) -> None:
    with Index(SPEC) as index:
        add(index, *"abc")
        try:
            items, _ = index.page(after=text)
        except FineLIPError:
            return
        assert [item.id for item in items] == [*"abc"][len("abc") - len(items) :]


@given(oldest=st.integers(0, 10**14), position=st.integers(0, 10**14), name=st.text(max_size=200))
def test_a_cursor_is_read_as_it_was_written(oldest: int, position: int, name: str) -> None:
    cursor = Cursor(oldest, position, name)
    assert Cursor.read(str(cursor)) == cursor


# Stored embeddings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_stored_embeddings_are_queries(tmp_path: Path, dtype: str) -> None:
    values = embeddings(5)
    spec = IndexSpec(checkpoint="abc", tokens=3, width=8, dtype=dtype)
    with Index(spec, tmp_path / "index") as index:
        index.add([*"abc"], values[:3], [{}] * 3)
        index.add([*"de"], values[3:], [{}] * 2)
        index.delete(["b"])
        stored = index.embeddings_of(["e", "a", "b", "nothing"])
        assert stored.keys() == {"e", "a"}
        for name, row in (("a", 0), ("e", 4)):
            assert stored[name].dtype == torch.float32
            torch.testing.assert_close(stored[name].norm(dim=-1), torch.ones(3))
            torch.testing.assert_close(stored[name], values[row], atol=0.02, rtol=0)
            assert index.search(stored[name][None], 1).items[0][0].id == name
        assert index.embeddings_of([]) == index.embeddings_of(["b"]) == {}
        index.maintain()
        assert index.embeddings_of(["e", "a"]).keys() == {"e", "a"}
        with pytest.raises(InputError, match="expected ids to be a list"):
            index.embeddings_of("a")


def test_a_damaged_embedding_is_no_query(tmp_path: Path) -> None:
    with Index(SPEC, tmp_path / "index") as index:
        add(index, *"abc")
    (path,) = (path for path in (tmp_path / "index" / "segments").iterdir() if path.suffix == ".safetensors")
    content = bytearray(path.read_bytes())
    content[content.index(embeddings(3)[1].half().numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with Index(SPEC, tmp_path / "index") as index, pytest.raises(StoreError, match="item 'b' is damaged"):
        index.embeddings_of([*"abc"])
