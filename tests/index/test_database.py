"""Catalogues of untrusted sources, of other users and of other processes: read, refused or waited for, but always checked."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from finelip_fast.errors import FineLIPError, InputError, StoreError
from finelip_fast.index import Index, IndexSpec, stored_index, stored_source
from finelip_fast.index.schema import FORMAT, seal, seal_item

SPEC = IndexSpec(checkpoint="abc", tokens=3, width=8)
EXAMPLES = int(os.environ.get("FINELIP_FUZZ", 30))


def embeddings(rows: int, seed: int = 0) -> Tensor:
    values = torch.randn(rows, SPEC.tokens, SPEC.width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1).half().float()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with closing(Index(SPEC, tmp_path / "index", source="mine")) as index:
        index.add(["a", "b"], embeddings(2), [{"n": 1}, {"n": 2}])
        index.add(["c"], embeddings(1, 1), [{"n": 3}])
        index.delete(["b"])
        index.speed_up("n")
    return tmp_path / "index"


def everything(folder: Path) -> Any:
    """Return everything that an index reports, queried in every way."""
    with closing(stored_index(folder)) as index:
        hits = index.search(embeddings(2), 3).items, index.search(embeddings(1), 3, where="n >= 1").items
        return index.ids, index.metadata, len(index), index.source, hits, index.check(), index.lost(), "a" in index


# Hostile ones ---------------------------------------------------------------------------------------------------------

ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x, x, x, x, x, x FROM n"
HOSTILE = {
    "recursive view": f"DROP TABLE item; CREATE VIEW item(position, id, crc, metadata, died, seal) AS {ENDLESS}",
    "view of the spec": f"DROP TABLE spec; CREATE VIEW spec(key, value, seal, a, b, c) AS {ENDLESS}",
    "view beside": f"CREATE VIEW other AS {ENDLESS}",
    "trigger": "CREATE TRIGGER evil AFTER INSERT ON item BEGIN DELETE FROM item; END",
    "virtual table": "CREATE VIRTUAL TABLE evil USING fts5(x)",
    "other table": "CREATE TABLE evil (x)",
    "no table": "DROP TABLE item",
    "no index": "DROP INDEX living",
    "generated column": "ALTER TABLE item ADD COLUMN x TEXT AS (id || id)",
    "more columns": "ALTER TABLE item ADD COLUMN x TEXT",
    "no STRICT": "DROP TABLE spec; CREATE TABLE spec (key TEXT PRIMARY KEY, value TEXT NOT NULL, seal INTEGER NOT NULL)",
    "other index": "CREATE INDEX evil ON item (metadata)",
    "index like one on a field": 'CREATE INDEX "field x" ON item (hex(metadata))',
    "statistics": "ANALYZE",
    "foreign": "DROP TABLE item; DROP TABLE spec; DROP TABLE segment; CREATE TABLE photos (x)",
}


@pytest.mark.parametrize("script", HOSTILE.values(), ids=HOSTILE)
def test_another_schema_is_refused_before_it_is_used(folder: Path, script: str) -> None:
    with closing(sqlite3.connect(folder / "catalogue.sqlite")) as connection:
        connection.executescript(script)
    for use in (lambda: Index(SPEC, folder), lambda: stored_index(folder), lambda: stored_source(folder)):
        with pytest.raises(StoreError, match="its tables are not those of an index"):
            use()


VALUES: list[Any] = [
    None,
    -1,
    0,
    2,
    10**18,
    2**63 - 1,
    -(2**63),
    1.5,
    float("inf"),
    b"\xff",
    "x",
    "\ud800",
    "../../x",
    "[]",
    "9" * 999,
]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.sampled_from(
        [("segment", name) for name in ("first", "name", "rows", "born")]
        + [("item", name) for name in ("position", "id", "crc", "metadata", "died")]
        + [
            ("spec", name)
            for name in (
                "format",
                "version",
                "oldest",
                "tokens",
                "width",
                "dtype",
                "alpha",
                "source",
                "tally",
                "tuning",
                "replaced",
            )
        ]
    ),
    value=st.sampled_from(VALUES)
    | st.sampled_from(
        ["null", "-1", "1e999", "NaN", "true", '""', "[" * 100_000, "{}", '{"a": 1}', "[1, 2]", '"\\ud800"', "1" * 5000]
    ),
    is_sealed=st.booleans(),
)
def test_whatever_a_row_says_is_an_error_or_the_right_answer(
    folder: Path, tmp_path: Path, place: tuple[str, str], value: Any, is_sealed: bool
) -> None:
    """Seals protect only against damage: an attacker who forges them may change answers, but must cause only our errors."""
    right = everything(folder)
    target = tmp_path / f"copy {time.monotonic_ns()}"
    shutil.copytree(folder, target)
    table, column = place
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogatepass")
    with closing(sqlite3.connect(target / "catalogue.sqlite", isolation_level=None)) as connection:
        connection.text_factory = bytes
        connection.execute("PRAGMA writable_schema = ON")  # files may contain what STRICT refuses
        connection.execute("UPDATE sqlite_master SET sql = replace(sql, 'STRICT', '') WHERE type = 'table'")
        connection.execute("PRAGMA schema_version = 99")
        with suppress(sqlite3.Error, OverflowError):
            if table == "spec":
                with suppress(sqlite3.Error):
                    connection.execute("INSERT INTO spec VALUES (?, '', 0)", [column])
                connection.execute("UPDATE spec SET value = ? WHERE key = ?", [value, column])
            else:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? WHERE rowid = (SELECT MIN(rowid) FROM {table})", [value]
                )
        if is_sealed:
            for name in ("spec", "segment", "item"):
                for rowid, *row, _ in connection.execute(f"SELECT rowid, * FROM {name}").fetchall():
                    with suppress(Exception):
                        connection.execute(
                            f"UPDATE {name} SET seal = ? WHERE rowid = ?",
                            [(seal_item if name == "item" else seal)(*row), rowid],
                        )
        connection.execute("UPDATE sqlite_master SET sql = sql || ' STRICT' WHERE type = 'table'")
    try:
        answer = everything(target)
    except FineLIPError:
        return
    finally:
        shutil.rmtree(target, ignore_errors=True)
    assert is_sealed or answer == right


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_are_an_error_or_no_matter(folder: Path, tmp_path: Path, flips: list[tuple[float, int]]) -> None:
    right = everything(folder)
    target = tmp_path / f"copy {time.monotonic_ns()}"
    shutil.copytree(folder, target)
    content = bytearray((target / "catalogue.sqlite").read_bytes())
    for share, bits in flips:
        content[int(share * len(content))] ^= bits
    (target / "catalogue.sqlite").write_bytes(content)
    try:
        answer = everything(target)
    except FineLIPError:
        return
    finally:
        shutil.rmtree(target, ignore_errors=True)
    assert answer == right


@pytest.mark.parametrize(
    "name", ["catalogue.sqlite", "catalogue.sqlite-wal", "catalogue.sqlite-shm", "catalogue.sqlite-journal"]
)
@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_what_is_no_file_is_not_waited_for_nor_written_through(folder: Path, name: str, kind: str) -> None:
    path, victim = folder / name, folder.parent / "victim"
    victim.write_bytes(b"mine")
    path.unlink(missing_ok=True)
    {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "link": lambda: path.symlink_to(victim)}[kind]()
    for use in (lambda: Index(SPEC, folder), lambda: stored_index(folder), lambda: stored_source(folder)):
        with pytest.raises(StoreError, match="cannot be opened as an index catalogue"):
            use()
    assert victim.read_bytes() == b"mine"


def test_a_catalogue_that_is_a_link_is_read_and_not_written_to(folder: Path) -> None:
    (folder / "catalogue.sqlite").rename(folder.parent / "blob")
    (folder / "catalogue.sqlite").symlink_to(folder.parent / "blob")
    with closing(stored_index(folder)) as index:
        assert index.ids == ["a", "c"]
        with pytest.raises(StoreError, match="is a symbolic link, which is not written through"):
            index.delete(["a"])


@pytest.mark.usefixtures("hears_interrupts")
def test_a_long_statement_ends_by_time_and_by_a_signal() -> None:
    script = f"""
import signal, sqlite3, threading
from finelip_fast.index import Index, IndexSpec
index = Index(IndexSpec("abc", 3, 8))
with index._store.catalogue._database.reading() as connection:
    try:
        connection.run({ENDLESS!r}, seconds=0.1)
    except sqlite3.OperationalError as error:
        print(error)
    threading.Timer(0.2, lambda: signal.raise_signal(signal.SIGINT)).start()
    try:
        connection.run({ENDLESS!r}, seconds=100)
    except KeyboardInterrupt:
        print("interrupted", len(index))
"""
    ended = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=300)
    assert ended.stdout == "a statement took more than 0 seconds\ninterrupted 0\n", ended.stderr


# Other processes ------------------------------------------------------------------------------------------------------


def test_who_reads_and_who_opens_waits_for_no_one_who_writes(folder: Path) -> None:
    with (
        closing(Index(SPEC, folder)) as index,
        closing(sqlite3.connect(folder / "catalogue.sqlite", isolation_level=None)) as writer,
    ):
        writer.execute("BEGIN IMMEDIATE")
        waiting = threading.Thread(target=lambda: index.add(["d"], embeddings(1, 5), [{}]))
        waiting.start()
        time.sleep(0.3)  # it waits for the writer now
        begun = time.monotonic()
        assert index.ids == ["a", "c"]
        assert len(index.search(embeddings(1), 3).items[0]) == 2
        assert stored_source(folder) == "mine"
        with closing(Index(SPEC, folder)) as another:
            assert another.ids == ["a", "c"]
        assert time.monotonic() - begun < 20  # a writer is waited for 30 seconds
        assert waiting.is_alive()
        writer.execute("ROLLBACK")
        waiting.join()
        assert index.ids == ["a", "c", "d"]


def remade(folder: Path) -> None:
    shutil.rmtree(folder)
    Index(SPEC, folder).close()


def restored(folder: Path) -> None:
    shutil.copyfile(folder / "catalogue.sqlite", folder / "copy")
    (folder / "copy").replace(folder / "catalogue.sqlite")


@pytest.mark.parametrize(
    "change",
    [shutil.rmtree, remade, restored, lambda folder: folder.rename(folder.parent / "moved")],
    ids=["removed", "made anew", "restored", "moved"],
)
def test_nothing_is_acknowledged_where_the_folder_is_another(folder: Path, change: Callable[[Path], object]) -> None:
    with closing(Index(SPEC, folder)) as index:
        index.add(["d"], embeddings(1, 2), [{}])
        change(folder)
        before = sorted(path for path in folder.rglob("*") if "sqlite-" not in path.name)
        for use, loss in (
            (lambda: index.add(["e"], embeddings(1, 3), [{}]), ", and this change was not saved"),
            (lambda: index.upsert(["a"], embeddings(1, 3), [{}]), ", and this change was not saved"),
            (lambda: index.delete(["a"]), ", and this change was not saved"),
            (lambda: index.ids, ""),
            (lambda: index.search(embeddings(1), 1), ""),
            (index.maintain, ", and this change was not saved"),
        ):
            with pytest.raises(StoreError, match=f"moved or replaced since it was opened{loss}; open its folder again"):
                use()
        assert sorted(path for path in folder.rglob("*") if "sqlite-" not in path.name) == before


def test_of_two_jobs_that_skip_what_is_there_none_fails(tmp_path: Path) -> None:
    ids = [f"item {number}" for number in range(40)]
    added: list[str] = []

    def work(index: Index) -> None:
        for start in range(0, 40, 4):
            batch = ids[start : start + 4]
            added.extend(index.add(batch, embeddings(4, start), [{}] * 4, existing="skip"))

    jobs = [Index(SPEC, tmp_path) for _ in range(3)]
    threads = [threading.Thread(target=work, args=[index]) for index in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(added) == sorted(ids) == sorted(jobs[0].ids)
    assert jobs[0].add([*ids[:2], "new"], embeddings(3), [{}] * 3, existing="skip") == ["new"]
    assert torch.equal(jobs[0].embeddings[-1], embeddings(3).half()[2])
    with pytest.raises(InputError, match="expected existing to be one of"):
        jobs[0].add([], embeddings(0), [], existing="keep")  # type: ignore[arg-type]
    for index in jobs:
        index.close()


def in_a_fork(use: Callable[[], object]) -> str:
    """Return a forked child's answer; it is killed after a timeout."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def work() -> None:
        try:
            answers.put(repr(use()))
        except BaseException as error:
            answers.put(repr(error))

    child = context.Process(target=work)
    child.start()
    child.join(300)
    if child.is_alive():
        child.kill()
        return "hangs"
    return str(answers.get())


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_a_forked_child_uses_what_was_open(tmp_path: Path, kind: str) -> None:
    index = Index(SPEC, None if kind == "memory" else tmp_path)
    index.add(["a"], embeddings(1), [{}])
    stop = threading.Event()

    def disturb() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            index.add([f"item {number}"], embeddings(1, number), [{}])
            index.search(embeddings(1), 2, where="n is null")

    before = torch.get_num_threads()
    torch.set_num_threads(2)  # started by OpenMP; the child does not have them
    torch.ones(1 << 20).exp_()
    threads = [threading.Thread(target=disturb)]
    for thread in threads:
        thread.start()
    try:
        for number in range(5):
            answer = in_a_fork(
                lambda number=number: (
                    index.search(embeddings(1), 1).items[0][0].id,
                    index.add([f"child {number}"], embeddings(1), [{}]),
                )
            )
            assert answer == f"('a', ['child {number}'])"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        torch.set_num_threads(before)
    assert ("child 0" in index) == (kind == "folder")  # an in-memory index was copied
    index.close()


def test_an_index_of_a_folder_is_pickled_by_what_it_was_opened_with(folder: Path) -> None:
    with (
        closing(Index(SPEC, folder, source="mine", version=2)) as index,
        closing(pickle.loads(pickle.dumps(index))) as copy,
    ):
        assert (copy.spec, copy.source, copy._store.fixed, copy.ids) == (SPEC, "mine", 2, ["a", "b", "c"])
    with pytest.raises(InputError, match="an in-memory index cannot be pickled; create it with a folder"):
        pickle.dumps(Index(SPEC))


def test_few_files_may_be_open(folder: Path) -> None:
    script = f"""
import resource, os
from finelip_fast.index import stored_index
from finelip_fast.errors import StoreError
import torch
index = stored_index({str(folder)!r})
files = []
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
try:
    while True:
        files.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
kinds = set()
for free in range(9):
    for use in (lambda: stored_index({str(folder)!r}), lambda: index.search(torch.eye(8)[None, :3], 1, where="n > 0"),
                lambda: index.search(torch.eye(8)[None, :3], 1, mode="two-stage", candidates=1), index.check):
        try:
            use()
        except StoreError as error:
            kinds.add("open files" in str(error))
    os.close(files.pop())
print(kinds <= {{True}} or kinds)
"""
    ended = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=300)
    assert ended.stdout == "True\n", ended.stdout + ended.stderr


# Older formats --------------------------------------------------------------------------------------------------------


def as_the_third_format(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "catalogue.sqlite", isolation_level=None)) as connection:
        items = connection.execute("SELECT position, id, crc, metadata, died FROM item").fetchall()
        segments = connection.execute("SELECT first, name, rows, born FROM segment").fetchall()
        spec = connection.execute("SELECT key, value FROM spec WHERE key NOT IN ('format', 'tally')").fetchall()
        for name in ("item", "segment", "spec"):
            connection.execute(f"DROP TABLE {name}")
        connection.executescript(
            """CREATE TABLE spec (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE segment (
    first INTEGER PRIMARY KEY,  -- position of its first item
    name TEXT NOT NULL UNIQUE,
    rows INTEGER NOT NULL,
    born INTEGER NOT NULL  -- the version that it came with
) STRICT;
CREATE TABLE item (
    position INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    crc INTEGER,  -- CRC-32 of the row's bytes; NULL: written before there were any
    metadata TEXT NOT NULL,
    died INTEGER  -- the version that it went with; NULL: it is there
) STRICT;
CREATE UNIQUE INDEX living ON item (id) WHERE died IS NULL;
CREATE INDEX dead ON item (died) WHERE died IS NOT NULL;
CREATE INDEX "field json_extract(metadata, '$.""n""')" ON item (json_extract(metadata, '$."n"'));"""
        )
        connection.executemany("INSERT INTO item VALUES (?, ?, ?, ?, ?)", items)
        connection.executemany("INSERT INTO segment VALUES (?, ?, ?, ?)", segments)
        connection.executemany("INSERT INTO spec VALUES (?, ?)", [*spec, ("format", "3")])


def objects(folder: Path) -> set[str]:
    with closing(sqlite3.connect(folder / "catalogue.sqlite")) as connection:
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")}


def test_a_folder_of_the_third_format_is_read_as_it_is_and_migrates_when_it_is_changed(folder: Path) -> None:
    right, before = everything(folder), objects(folder)
    as_the_third_format(folder)
    content = (folder / "catalogue.sqlite").read_bytes()
    assert everything(folder) == right
    assert (folder / "catalogue.sqlite").read_bytes() == content
    with closing(stored_index(folder)) as index, closing(stored_index(folder)) as second_index:
        assert second_index.ids == ["a", "c"]
        index.add(["d"], embeddings(1, 5), [{"n": 4}])
        assert index.ids == second_index.ids == ["a", "c", "d"]
        assert index._store.catalogue.note("format") == FORMAT
        second_index.delete(["d"])
        assert index.check() == second_index.check() == {}
        assert index.search(embeddings(1), 3, where="n = 3").items[0][0].id == "c"
    assert objects(folder) == before
    assert everything(folder) == right


@pytest.mark.parametrize(
    "change", [lambda index: index.speed_up("m"), Index.maintain, lambda index: index.delete(["a"])]
)
def test_any_change_makes_the_third_format_this(folder: Path, change: Callable[[Index], object]) -> None:
    as_the_third_format(folder)
    with closing(stored_index(folder)) as index:
        change(index)
        assert index._store.catalogue.note("format") == FORMAT
        assert index.check() == {}
