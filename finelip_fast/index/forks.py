"""Keep SQLite usable in processes that fork."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

from finelip_fast.errors import StoreError


class _Gate:
    """Delay forks while another thread uses SQLite, because its locks would be held forever in the child.

    Transactions and searches enter the gate before they take any lock. If one does not end in time, the process is forked
    anyway, and using an index in the child raises an error.
    """

    _PATIENCE = 10.0

    def __init__(self, is_broken: bool = False) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._inside = 0
        self._depth = threading.local()
        self._is_closed, self._is_broken = False, is_broken

    def __enter__(self) -> None:
        if self._is_broken:
            raise StoreError(
                "an index was in use in another thread when this process forked, and cannot be used here; use the spawn or "
                "forkserver start method, or fork before using an index"
            )
        depth = getattr(self._depth, "value", 0)
        if not depth:
            with self._changed:
                while self._is_closed:
                    self._changed.wait()
                self._inside += 1
        self._depth.value = depth + 1

    def __exit__(self, *_: object) -> None:
        self._depth.value -= 1
        if not self._depth.value:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def before_fork(self) -> None:
        self._changed.acquire()
        self._is_closed = True
        if self._changed.wait_for(lambda: not self._inside, 0 if getattr(self._depth, "value", 0) else self._PATIENCE):
            for user in list(_survivors):
                user.before_fork()

    def after_fork(self) -> None:
        self._is_closed = False
        self._changed.notify_all()
        self._changed.release()

    def in_child(self) -> _Gate:
        """The gate of a forked process."""
        return _Gate(is_broken=bool(self._inside))


_gate = _Gate()
_survivors: weakref.WeakSet[Any] = weakref.WeakSet()
inherited: list[object] = []  # connections of a parent process, which its children keep open


def between_forks() -> _Gate:
    """Context in which no other thread forks this process."""
    return _gate


def survive_forks(user: Any) -> None:
    """Register an object whose ``before_fork`` is called before each fork, and ``after_fork`` in the child."""
    _survivors.add(user)


def _in_child() -> None:
    global _gate
    _gate = _gate.in_child()
    for user in list(_survivors):
        user.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _gate.before_fork(), after_in_parent=lambda: _gate.after_fork(), after_in_child=_in_child
    )
