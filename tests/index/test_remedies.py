"""The advice in the index's errors is followed, and works."""

from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from finelip_fast.cli import main
from finelip_fast.errors import FineLIPError
from finelip_fast.index import Index, IndexSpec, forks, stored_index
from finelip_fast.index.recovery import restore
from finelip_fast.index.tune import sample_queries, tune

SPEC = IndexSpec(checkpoint="abc", tokens=3, width=8)
IDS = [f"{number}" for number in range(120)]


def embeddings(rows: int) -> Tensor:
    values = torch.randn(rows, SPEC.tokens, SPEC.width, generator=torch.Generator().manual_seed(rows))
    return torch.nn.functional.normalize(values, dim=-1)


QUERY = embeddings(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose name contains a space, with a snapshot beside it."""
    with closing(Index(SPEC, tmp_path / "an index")) as index:
        for ids in (IDS[:60], IDS[60:]):
            index.add(ids, embeddings(60), [{"camera": "X100"}] * 60)
        index.snapshot(tmp_path / "snapshot")
    return tmp_path / "an index"


@pytest.fixture
def index(folder: Path) -> Iterator[Index]:
    with closing(Index(SPEC, folder)) as opened:
        yield opened


def finelip(advice: str, error: FineLIPError, **filled: object) -> None:
    """Run the command that a message advises; words in capitals are placeholders for the user."""
    match = re.search(rf"finelip ({advice} .*?--index '[^']+'(?: --restore)?)", str(error))
    assert match, error
    words = [str(filled.get(word, word)) for word in shlex.split(match[1])]
    assert main([*words, "--quiet"]) == 0


# Calls that are refused -----------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A refused call, the advice in its error, and the call that follows the advice."""

    refused: Callable[[Index], Any]
    advice: str
    mended: Callable[[Index], Any]


ONE, LONG = embeddings(1), {"text": "x" * (1 << 26)}
MANY = " or ".join(f"{'field' * 190}{number} in (1, 'a', true)" for number in range(190))
CASES = {
    "an id that is taken": Case(lambda index: index.add(["3"], ONE, [{}]), "pass other ids, or existing='skip' or",
                                lambda index: (index.add(["new"], ONE, [{}]), index.upsert(["3"], ONE, [{}]))),
    "an id twice": Case(lambda index: index.add(["a", "a"], embeddings(2), [{}, {}]), "expected unique ids, got 'a' twice",
                        lambda index: index.add(["a"], ONE, [{}])),
    "long rows": Case(lambda index: index.add(["a"], 2 * ONE, [{}]), "normalize them: torch.nn.functional.normalize(",
                      lambda index: index.add(["a"], torch.nn.functional.normalize(2 * ONE, dim=-1), [{}])),
    "large metadata": Case(lambda index: index.add(["a"], ONE, [LONG]), "keep it in a file",
                           lambda index: index.add(["a"], ONE, [{"text": "x.txt"}])),
    "nothing to tune": Case(lambda _: sample_queries(Index(SPEC)), "add items first",
                            lambda index: sample_queries(index)),
    "a filter that is none": Case(lambda index: index.ids_matching(5), "write e.g. \"camera = 'X100'\"",
                                  lambda index: index.ids_matching("camera = 'X100'")),
    "a field that is none": Case(lambda index: index.speed_up("camera = 1"), 'camera, place.city or "any name"',
                                 lambda index: [index.speed_up(name) for name in ("camera", "place.city", '"any name"')]),
    "a long filter": Case(lambda index: index.ids_matching(f"camera = '{'x' * 1_000_000}'"), "; split it into several",
                          lambda index: index.ids_matching("camera = 'x'")),
    "a filter of long names": Case(lambda index: index.ids_matching(MANY), "split it into several searches",
                                   lambda index: [index.ids_matching(part) for part in MANY.split(" or ")[:3]]),
}  # fmt: skip


@pytest.fixture
def with_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    def ids_matching(self: Index, where: Any) -> list[str]:
        return [item.id for item in self.items(where=where)]

    monkeypatch.setattr(Index, "ids_matching", ids_matching, raising=False)


@pytest.mark.usefixtures("with_filters")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_call_that_is_mended_as_advised_succeeds(index: Index, case: Case) -> None:
    with pytest.raises(FineLIPError, match=re.escape(case.advice)):
        case.refused(index)
    case.mended(index)


# A filter that is refused, the advice, and the filter that follows it.
FILTERS = [
    ("camera = X100", "write a 'text' in single quotes", "camera = 'X100'"),
    ("camera = null", "for missing values use: field is null", "camera is null"),
    ("camera is 'X100'", "compare with other values by =", "camera = 'X100'"),
    ("'X100' = camera", "a comparison begins with a field: camera = 'X100'", "camera = 'X100'"),
    ('camera == "X100"', "write a 'text' in single quotes", "camera == 'X100'"),
    ("f# = 1", 'fields with characters other than letters, digits and _ in "double quotes"', '"f#" = 1'),
    ("name = 'it's'", "with '' for a quote inside", "name = 'it''s'"),
    ("camera in 'X100'", "write a list as (value, value, ...)", "camera in ('X100', 'X200')"),
    ("camera like 5", "write a text, as in like 'X1%'", "camera like 'X1%'"),
    ("camera like '" + "%x" * 40 + "'", "write a simpler pattern, as in like 'X1%'", "camera like 'X1%'"),
    ("width between 1, 5", "field between 1 and 5", "width between 1 and 5"),
    ("width between 1 and 'b'", "write two numbers or two texts", "width between 'a' and 'b'"),
    ("width = 1 and (a = 1", "close the parenthesis at column 15", "width = 1 and (a = 1)"),
    ("width 1", "the operators are = != < <= > >=", "width >= 1"),
    ("(" * 100 + "a = 1" + ")" * 100, "nest fewer of them", "((a = 1))"),
    (" or ".join(["a = 1"] * 400), "combine values of a field: field in (value, ...)", "a in (1, 2, 3)"),
]


@pytest.mark.parametrize(("where", "advice", "mended"), FILTERS)
def test_a_filter_that_is_written_as_advised_is_read(index: Index, where: str, advice: str, mended: str) -> None:
    with pytest.raises(FineLIPError, match=re.escape(advice)):
        list(index.items(where=where))
    list(index.items(where=mended))


# Folders --------------------------------------------------------------------------------------------------------------


def move(index: Index) -> None:
    index.folder.rename(index.folder.with_name("elsewhere"))
    shutil.copytree(index.folder.with_name("elsewhere"), index.folder)


@pytest.mark.parametrize("disturb", [Index.close, move])
def test_an_index_that_is_opened_again_can_be_changed(index: Index, disturb: Callable[[Index], None]) -> None:
    disturb(index)
    with pytest.raises(FineLIPError, match=r"[:;] open its folder again$"):
        index.add(["new"], ONE, [{}])
    with closing(stored_index(index.folder)) as again:
        again.add(["new"], ONE, [{}])
        assert again.ids == [*IDS, "new"]


def test_an_older_version_is_changed_where_it_is_open_without_one(folder: Path) -> None:
    with (
        closing(Index(SPEC, folder, version=1)) as old,
        pytest.raises(FineLIPError, match="read-only; open it without version to change it"),
    ):
        old.delete(["3"])
    with closing(Index(SPEC, folder)) as newest:
        newest.delete(["3"])


def test_a_process_that_writes_is_waited_for(index: Index, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finelip_fast.index.database._PATIENCE", 0.1)
    monkeypatch.setattr("finelip_fast.index.database._WAIT", 0.1)
    with closing(Index(SPEC, folder)) as second_index:
        with (
            second_index._store.catalogue.changing(),
            pytest.raises(FineLIPError, match="wait until it is done, and try again"),
        ):
            index.delete(["3"])
        index.delete(["3"])


def test_where_there_is_no_index_one_is_made(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(FineLIPError, match=r"there is no index at .*: make one with finelip add") as caught:
        stored_index(tmp_path / "new index")
    finelip("add FOLDER", caught.value, FOLDER=tmp_path / "photos")
    stored_index(tmp_path / "new index").close()


def test_a_root_that_cannot_be_read_is_set(index: Index, tmp_path: Path) -> None:
    index._store.catalogue.keep("root", 5)
    with pytest.raises(FineLIPError, match=r"the index at .* has an invalid root, 5; set it with") as caught:
        index.root  # noqa: B018
    finelip("index move-root FOLDER", caught.value, FOLDER=tmp_path)
    assert index.root == tmp_path.resolve()


def test_what_was_tuned_and_cannot_be_read_is_tuned_again(index: Index) -> None:
    index._store.catalogue.keep("tuning", {"candidates": "x"})
    with pytest.raises(FineLIPError, match=r" again, or discard them in Python: index\.tuning = None$") as caught:
        index.search(QUERY, 1)
    with closing(Index(SPEC, index.folder)) as second_index:
        second_index.tuning = None
        assert index.search(QUERY, 1).items[0]
        second_index._store.catalogue.keep("tuning", {"candidates": "x"})
    finelip("index tune", caught.value)
    assert index.tuning is not None
    assert index.search(QUERY, 1).items[0]


def damage_a_row(folder: Path) -> None:
    segment = next((folder / "segments").glob("*.safetensors"))
    content = bytearray(segment.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 64  # after the header, in the first item's embedding
    segment.write_bytes(content)


def lose_a_segment(folder: Path) -> None:
    next((folder / "segments").glob("*.safetensors")).unlink()


def look(folder: Path) -> None:
    with closing(Index(SPEC, folder)) as index:
        index.search(QUERY, len(IDS))


def compact(folder: Path) -> None:
    with closing(Index(SPEC, folder)) as index:
        index.maintain()


def take_a_snapshot(folder: Path) -> None:
    with closing(Index(SPEC, folder)) as index:
        index.snapshot(folder.with_name("another snapshot"))


@pytest.mark.parametrize("way", ["repaired", "restored"])
@pytest.mark.parametrize("use", [look, compact, take_a_snapshot])
@pytest.mark.parametrize("damage", [damage_a_row, lose_a_segment])
def test_damaged_items_are_taken_out_or_restored(
    folder: Path, damage: Callable[[Path], None], use: Callable[[Path], None], way: str
) -> None:
    damage(folder)
    with pytest.raises(FineLIPError, match="restore") as caught:
        use(folder)
    if way == "repaired":
        finelip("index repair", caught.value)
    else:
        shutil.copytree(folder.with_name("snapshot") / "segments", folder / "segments", dirs_exist_ok=True)
    use(folder)
    with closing(Index(SPEC, folder)) as index:
        assert set(index.ids) <= set(IDS)
        assert (index.ids == IDS) == (way == "restored")


def lose_the_catalogue(folder: Path) -> None:
    for path in folder.glob("catalogue*"):
        path.unlink()


def write_no_spec(folder: Path) -> None:
    with closing(Index(SPEC, folder)) as index:
        index._store.catalogue.keep("tokens", -1)


@pytest.mark.parametrize(
    ("damage", "use"), [(lose_the_catalogue, lambda folder: Index(SPEC, folder)), (write_no_spec, stored_index)]
)
def test_a_catalogue_is_restored_from_a_snapshot(
    folder: Path, damage: Callable[[Path], None], use: Callable[[Path], Index]
) -> None:
    damage(folder)
    with pytest.raises(FineLIPError, match="restore it from a snapshot"):
        use(folder)
    shutil.copy(folder.with_name("snapshot") / "catalogue.sqlite", folder / "catalogue.sqlite")
    look(folder)


def test_without_a_copy_or_list_a_snapshot_is_restored(folder: Path) -> None:
    for path in [*folder.glob("*copy*"), *(folder / "segments").glob("*.items")]:
        path.unlink()
    with pytest.raises(FineLIPError, match=r"; restore a snapshot$"):
        restore(folder)
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("snapshot"), folder)
    look(folder)


def test_a_link_in_the_place_of_the_catalogue_is_replaced_by_what_it_leads_to(folder: Path, tmp_path: Path) -> None:
    catalogue = folder / "catalogue.sqlite"
    catalogue.rename(tmp_path / "elsewhere.sqlite")
    catalogue.symlink_to(tmp_path / "elsewhere.sqlite")
    with (
        closing(Index(SPEC, folder)) as index,
        pytest.raises(FineLIPError, match="is not written through; replace it with a copy of the file"),
    ):
        index.delete(["3"])
    catalogue.unlink()
    shutil.copy(tmp_path / "elsewhere.sqlite", catalogue)
    with closing(Index(SPEC, folder)) as index:
        index.delete(["3"])


def test_a_folder_that_is_a_link_is_moved_into_the_index(folder: Path, tmp_path: Path) -> None:
    (folder / "segments").rename(tmp_path / "segments")
    (folder / "segments").symlink_to(tmp_path / "segments")
    with pytest.raises(FineLIPError, match="is a symbolic link; replace it with the folder that it points to"):
        look(folder)
    (folder / "segments").unlink()
    (tmp_path / "segments").rename(folder / "segments")
    look(folder)


def test_too_few_items_for_faiss_are_searched_flat(index: Index) -> None:
    pytest.importorskip("faiss")
    with pytest.raises(FineLIPError, match="as lists, got 120 for 200; use fewer lists, or search without them"):
        index.build_candidates(lists=200, progress=False)
    assert index.search(QUERY, 3, mode="two-stage", candidates=10).items[0]


def test_an_index_too_small_to_tune_is_searched_exactly(folder: Path) -> None:
    with closing(Index(SPEC)) as index:
        index.add(IDS[:3], embeddings(3), [{}] * 3)
        with pytest.raises(FineLIPError, match="search an index this small exactly"):
            tune(index, QUERY, progress=False)
        assert index.search(QUERY, 1).mode == "exact"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python's warning about forks beside threads
def test_processes_that_are_started_otherwise_search(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks._Gate, "_PATIENCE", 0)
    entered, leave = threading.Event(), threading.Event()

    def use() -> None:
        with forks.between_forks():
            entered.set()
            leave.wait()

    user = threading.Thread(target=use)
    user.start()
    entered.wait()
    child = os.fork()
    if not child:
        try:
            index.search(QUERY, 1)
        except FineLIPError as error:
            os._exit("use the spawn or forkserver start method, or fork before" in str(error))
        finally:
            os._exit(2)
    leave.set()
    user.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    for method in ("spawn", "forkserver", "fork"):
        process = multiprocessing.get_context(method).Process(target=index.search, args=[QUERY, 1])
        process.start()
        process.join()
        assert process.exitcode == 0
