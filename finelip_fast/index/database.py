"""Connections to the SQLite file of a catalogue: one that writes, and a few that read and never wait for it.

A file from elsewhere is not trusted: every new connection is hardened and its schema checked before any other query, and every
statement ends after a time limit or by Ctrl-C. Reading requires no write permission.
"""

from __future__ import annotations

import math
import os
import shutil
import sqlite3
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from finelip_fast._files import SCARCE, free_space, kind_of
from finelip_fast.errors import StoreError
from finelip_fast.index import remedies
from finelip_fast.index.forks import between_forks, inherited, survive_forks

# How long a statement may take, and how long to wait for another writer: compaction takes time.
_SECONDS, _PATIENCE = 60.0, 30.0
# SQLite's own waiting cannot be interrupted, so each wait is this short.
_WAIT = 0.1
_STEPS = 10_000  # instructions of SQLite's virtual machine between two checks of the clock
_READERS = 8  # connections of one process
_LONGEST = 1 << 27  # bytes of one value
_MOST_COPIED = 1 << 32  # bytes
_LOGS = ("-wal", "-journal")


class Connection(sqlite3.Connection):
    """A connection whose statements have a time limit.

    Attributes:
        frozen: State of the files, for a connection that does not see later changes; None: it sees them.
        sealed: Whether the rows carry checksums.
    """

    frozen: tuple[Any, ...] | None = None
    sealed = True
    _deadline = math.inf
    _expired = False

    def harden(self) -> None:
        self.text_factory = bytes  # damaged text may not be UTF-8
        self.set_progress_handler(self._watch, _STEPS)
        if hasattr(self, "setlimit"):  # Python 3.11
            self.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)  # type: ignore[attr-defined]
            self.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)  # type: ignore[attr-defined]
        if hasattr(self, "setconfig"):  # Python 3.12
            self.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE)  # type: ignore[attr-defined]
        self.run("PRAGMA cell_size_check = ON")

    def run(self, query: str, *values: Any, seconds: float = _SECONDS) -> list[Any]:
        """Run a statement and return all rows."""
        with self._bounded(seconds):
            return self.execute(query, values).fetchall()

    def run_each(self, query: str, rows: Iterable[Iterable[Any]]) -> None:
        """Run a statement for each row, without a time limit."""
        with self._bounded(math.inf):
            self.executemany(query, rows)  # type: ignore[arg-type]

    def _watch(self) -> bool:
        self._expired = time.monotonic() > self._deadline
        return self._expired

    @contextmanager
    def _bounded(self, seconds: float) -> Iterator[None]:
        self._deadline, self._expired = time.monotonic() + seconds, False
        try:
            yield
        except sqlite3.OperationalError as error:
            if str(error) != "interrupted":
                raise
            if not self._expired:  # a signal raised an exception in the handler, which sqlite3 does not pass on
                raise KeyboardInterrupt from None
            raise sqlite3.OperationalError(f"a statement took more than {seconds:.0f} seconds") from None
        except (UnicodeDecodeError, OverflowError) as error:  # names in a damaged schema; numbers beyond 64 bits
            raise sqlite3.DatabaseError(f"malformed text or number, {error}") from None


def closed(path: Path | None) -> StoreError:
    """The error of using an index that was closed; ``path`` is None if it was in memory."""
    remedy = (
        "its items were in memory, and went with it; add them to a new one" if path is None else "open its folder again"
    )
    return StoreError(f"the index is closed: {remedy}")


class Database:
    """One database, in a file or in memory.

    It may be used from several threads, and in a forked process, which reopens the file or has a copy of the data in memory.

    Args:
        path: Path of the file; None: in memory.
        prepare: Function that checks every new connection to a file, and raises if something is wrong.
    """

    def __init__(self, path: Path | None, prepare: Callable[[Connection], object]) -> None:
        self.path, self._prepare = path, prepare
        self.is_closed = False
        self._identity: tuple[int, int] | None = None
        self._writer: Connection | None = None
        self._idle: list[Connection] = []
        self._new_locks()
        self._owned: set[Connection] = set()
        weakref.finalize(self, _close, self._owned, os.getpid())
        if path is None:
            self._writer = self._connect(":memory:")
        survive_forks(self)

    def _new_locks(self) -> None:
        self._writing = threading.RLock()
        self._readers = threading.BoundedSemaphore(_READERS)
        self._current = threading.local()

    def before_fork(self) -> None:
        """Close connections, since the child would inherit SQLite's record of the files that this process has locked."""
        if self.path is not None:
            _close(self._owned, os.getpid())
            self._idle, self._writer = [], None

    def after_fork(self) -> None:
        self._new_locks()
        if self._owned and self.path is not None:
            inherited.append(self._owned)  # closing them here would release the parent's locks
            self._owned, self._writer, self._idle = set(), None, []
        weakref.finalize(self, _close, self._owned, os.getpid())

    @property
    def read_only(self) -> bool:
        """Whether the folder cannot be written to."""
        return self.path is not None and not _is_writable(self.path.parent)

    @property
    def folder(self) -> str:
        return "(in memory)" if self.path is None else str(self.path.parent)

    # Transactions -------------------------------------------------------------------------------------------------------

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Read from one consistent snapshot; inside :meth:`writing`, this includes what was written there.

        Raises:
            StoreError: The file cannot be read, or is not the one that was opened.
        """
        current = getattr(self._current, "connection", None)
        if current is not None:
            yield current
            return
        if self.path is None:
            with between_forks(), self._writing:
                writer = self._writer
                assert writer is not None
                with self._errors(f"the index at {self.folder} cannot be read"):
                    yield writer
            return
        with between_forks(), self._readers, self._errors(f"the index at {self.folder} cannot be read"):
            connection = self._take()
            try:
                connection.run("BEGIN")
                self._current.connection = connection
                try:
                    yield connection
                finally:
                    self._current.connection = None
                    with suppress(sqlite3.Error):
                        connection.run("ROLLBACK")
            finally:
                self._give_back(connection)

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Commit at the end, and roll back on an error; other writers wait. A nested call is part of the outer one.

        Raises:
            StoreError: Another process keeps writing, or the file cannot be written or is not the one that was opened; then
                nothing that was written is kept.
        """
        before: Connection | None = getattr(self._current, "connection", None)
        if before is not None and before is self._writer:
            yield before
            return
        with between_forks(), self._writing, self._errors(f"the index at {self.folder} cannot be written"):
            if self.path is not None:
                self.check_place(writing=True)
                self._writer = self._writer or self._open_writer()
            writer = self._writer
            assert writer is not None
            self._begin(writer)
            self._current.connection = writer
            try:
                self.check_place(writing=True)
                yield writer
                writer.run("COMMIT", seconds=math.inf)
            except BaseException:
                if writer.in_transaction:  # a full disk has already ended it
                    writer.run("ROLLBACK")
                raise
            finally:
                self._current.connection = before
            self.check_place(writing=True)

    def _begin(self, writer: Connection) -> None:
        patience = time.monotonic() + _PATIENCE
        while True:
            try:
                writer.run("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > patience:
                    raise

    def check_place(self, *, writing: bool = False) -> None:
        """
        Raises:
            StoreError: The file is no longer where it was opened.
        """
        if self._identity is not None and _identity(self.path) != self._identity:
            loss = ", and this change was not saved" if writing else ""
            raise StoreError(
                f"the index at {self.folder} was removed, moved or replaced since it was opened{loss}; open its folder again"
            )

    def forget_readers(self) -> None:
        """Use new connections for all later reads."""
        idle, self._idle = self._idle, []
        for connection in idle:
            self._close(connection)

    def close(self) -> None:
        with self._writing:
            self.is_closed = True
            _close(self._owned, os.getpid())
            self._idle, self._writer = [], None

    # Opening ------------------------------------------------------------------------------------------------------------

    def _take(self) -> Connection:
        if self.is_closed:
            raise closed(self.path)
        self.check_place()
        with suppress(IndexError):
            connection = self._idle.pop()
            if connection.frozen in (None, _state(self.path)):
                return connection
            self._close(connection)
        with self._errors(f"{self.path} cannot be opened as an index catalogue"):
            return self._open_reader()

    def _give_back(self, connection: Connection) -> None:
        if self.is_closed or connection not in self._owned:
            self._close(connection)
        else:
            self._idle.append(connection)

    def _close(self, connection: Connection) -> None:
        self._owned.discard(connection)
        connection.close()

    def create(self) -> None:
        """Create the file if there is none."""
        assert self.path is not None
        _check_files(self.path)
        with between_forks(), self._errors(f"the index at {self.folder} cannot be written"):
            self._writer = self._connect(f"{self.path.absolute().as_uri()}?mode=rwc")
            self._configure(self._writer)
        self._identity = _identity(self.path)

    def _open_writer(self) -> Connection:
        assert self.path is not None
        if self.path.is_symlink():
            raise StoreError(
                f"{self.path} is a symbolic link, which is not written through; replace it with a copy of the file"
            )
        if self.read_only:
            raise sqlite3.OperationalError("attempt to write a readonly database")
        connection = self._checked(lambda: self._connect(f"{self._uri}?mode=rw"))
        self._configure(connection)
        return connection

    @staticmethod
    def _configure(connection: Connection) -> None:
        # A short log: if it is damaged, its contents are lost and can be recovered only from the segments.
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "wal_autocheckpoint = 100"):
            connection.run(f"PRAGMA {pragma}")

    @property
    def _uri(self) -> str:
        assert self.path is not None
        return self.path.resolve().as_uri()

    def _open_reader(self) -> Connection:
        assert self.path is not None
        modes = ["mode=ro"] if self.read_only else ["mode=rw", "mode=ro", "mode=ro&readonly_shm=1"]
        for mode in modes:
            # Fails if the files beside it, which writers and readers share, are missing and cannot be created.
            with suppress(sqlite3.OperationalError):
                return self._checked(partial(self._connect, f"{self._uri}?{mode}", read_only=True))
        return self._checked(self._open_frozen)

    def _open_frozen(self) -> Connection:
        """Open the file without those beside it: nobody writes, or the log is read in a copy."""
        assert self.path is not None
        before = _state(self.path)
        if not any(_size(Path(f"{self.path.resolve()}{log}")) for log in _LOGS):
            connection = self._connect(f"{self._uri}?mode=ro&immutable=1", read_only=True)
        else:
            connection = self._copied()
        connection.frozen = before
        return connection

    def _copied(self) -> Connection:
        """A copy in memory, including changes that only the log has."""
        assert self.path is not None
        files = [Path(f"{self.path.resolve()}{ending}") for ending in ("", *_LOGS)]
        if sum(map(_size, files)) > _MOST_COPIED:
            raise sqlite3.OperationalError(
                f"its last changes are still in {self.path.name}-wal: open it once with write permission"
            )
        try:
            with tempfile.TemporaryDirectory(prefix="finelip-") as folder:
                for file in files:
                    if file.exists():
                        shutil.copyfile(file, Path(folder, file.name))
                with closing(self._connect(f"{Path(folder, files[0].name).as_uri()}?mode=rw")) as copy:
                    copy.run("SELECT 1 FROM sqlite_master")
                    connection = self._connect(":memory:")
                    copy.backup(connection)
        except OSError as error:
            raise sqlite3.OperationalError(
                f"its last changes are still in {self.path.name}-wal, which cannot be copied to read them ({error.strerror}): "
                "open it once with write permission"
            ) from None
        connection.run("PRAGMA query_only = ON")
        return connection

    def _checked(self, connect: Callable[[], Connection]) -> Connection:
        """A new connection, checked to be to the same file and to have the expected schema."""
        assert self.path is not None
        _check_files(self.path)
        identity = _identity(self.path)
        connection = connect()
        try:
            self._prepare(connection)
            if self._identity is None and _identity(self.path) == identity:
                self._identity = identity
            self.check_place()
        except BaseException:
            self._close(connection)
            raise
        return connection

    def _connect(self, target: str, *, read_only: bool = False) -> Connection:
        connection = sqlite3.connect(
            target,
            isolation_level=None,
            check_same_thread=False,
            uri=target != ":memory:",
            timeout=_PATIENCE if read_only else _WAIT,
            factory=Connection,
        )
        self._owned.add(connection)
        try:
            connection.harden()
            if read_only:
                connection.run("SELECT 1 FROM sqlite_master")  # opens the log
        except BaseException:
            self._close(connection)
            raise
        return connection

    @contextmanager
    def _errors(self, activity: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self.failure(error, activity) from None

    def failure(self, error: sqlite3.Error, activity: str) -> StoreError:
        """Convert SQLite's error to one that says what to do."""
        reason = str(error)
        if self.is_closed:
            return closed(self.path)
        if "locked" in reason:
            return StoreError(
                f"another process is writing to the index at {self.folder}; wait until it is done, and try again"
            )
        if self.path is not None:
            reason += _lack_of_space(self.path, reason)
        if "unable to open" in reason and self.path is not None:
            reason += _hindrance(self.path)
        if any(word in reason for word in ("malformed", "not a database", "corrupt", "out of order")):
            reason += f"; the catalogue is damaged: {remedies.restore(self.folder)}"
        return StoreError(f"{activity}: {reason}")


def _check_files(path: Path) -> None:
    """
    Raises:
        StoreError: A file is not a regular one: SQLite would wait for a pipe, and write through a link.
    """
    for ending in ("", *_LOGS, "-shm"):
        file = Path(f"{path.resolve()}{ending}")
        with suppress(OSError):
            if not stat.S_ISREG(mode := file.lstat().st_mode):
                raise StoreError(
                    f"{file} cannot be opened as an index catalogue: expected a regular file, got {kind_of(mode)}"
                )


def _identity(path: Path | None) -> tuple[int, int] | None:
    assert path is not None
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _state(path: Path | None) -> tuple[Any, ...]:
    """A value that changes with every change of the files."""
    state: list[Any] = []
    for ending in ("", *_LOGS):
        with suppress(OSError):
            status = os.stat(f"{path}{ending}")
            state += [ending, status.st_ino, status.st_size, status.st_mtime_ns]
    return tuple(state)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _is_writable(path: Path) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _lack_of_space(path: Path, reason: str) -> str:
    """The free space, if a full disk may be the cause: SQLite then calls a file readonly whose log it cannot create."""
    is_full = "is full" in reason or ("readonly" in reason and _is_writable(path) and _is_writable(path.parent))
    with suppress(OSError):
        free, folder = free_space(path)
        if is_full or ("disk I/O" in reason and free < SCARCE):
            return f"; the disk may be full: {free / (1 << 20):.1f} MiB are free at {folder}"
    return ""


def _hindrance(path: Path) -> str:
    """The reason why a file cannot be opened, which SQLite does not give."""
    files = []
    try:
        for _ in range(4):  # as SQLite needs for a database and its log
            files.append(os.open(path, os.O_RDONLY))
    except OSError as error:
        return f" ({error.strerror})"
    finally:
        for file in files:
            os.close(file)
    return ""


def _close(connections: set[Connection], process: int) -> None:
    if os.getpid() == process:  # not a forked one that exits
        while connections:
            with suppress(KeyError, sqlite3.Error):
                connections.pop().close()
