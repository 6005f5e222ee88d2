"""Launch settings that were measured: those shipped with the package, and those that tuning wrote on this machine.

A table is a JSON object from keys to settings. A key names the operation, the GPU's compute capability, the dtype and the
sizes that matter: ``"clim sm_90 float16 D=512 L=40 Q=1"``. What is in no table runs with the defaults of its kernel's file;
nothing is ever tuned during a search.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from finelip_fast._files import cache_folder, write_error, write_text_whole
from finelip_fast._json import read_json
from finelip_fast._typed import typed
from finelip_fast.errors import KernelError

_MAX_BYTES = 1 << 24
_LARGEST = 1 << 16  # no block is as large, on any GPU

SHIPPED = Path(__file__).with_name("settings.json")

Numbers = dict[str, Any]  # of a settings dataclass, by field: whole numbers and truth values
S = TypeVar("S")
F = TypeVar("F", bound=Callable[..., Any])

_caches: list[Callable[[], None]] = []


def until_saved(function: F) -> F:
    """Cache results until :func:`save`: what was tuned counts at once, also in the process that tuned."""
    cached: Any = functools.cache(function)
    _caches.append(cached.cache_clear)
    return cached  # type: ignore[no-any-return]


def cache_file() -> Path:
    """Where tuning writes."""
    return cache_folder() / "settings.json"


def key(operation: str, *, capability: int, dtype: torch.dtype, **sizes: int) -> str:
    """The name of a case; sizes in the order given."""
    numbers = " ".join(f"{name}={value}" for name, value in sizes.items())
    return f"{operation} sm_{capability} {str(dtype).removeprefix('torch.')} {numbers}"


def tuned(case: str, kind: Callable[..., S]) -> S | None:
    """Settings of a case: this machine's own before the shipped ones, None where neither has any.

    Args:
        case: A :func:`key`.
        kind: The dataclass of the kernel's settings.

    Raises:
        KernelError: A table that cannot be read, or settings that are not this kernel's.
    """
    numbers = _tables(cache_file()).get(case)
    try:
        for name, value in (numbers or {}).items():
            if isinstance(value, bool) != isinstance(getattr(kind, name, None), bool):
                raise TypeError(f"{name} is {value!r}")
        return None if numbers is None else kind(**numbers)
    except TypeError as error:
        _forget()  # the table may be mended while this process lives
        raise KernelError(
            f"the launch settings of {case!r} are not this version's: {error}; tune again, or delete {cache_file()}"
        ) from error


def summary() -> str:
    """How many settings are in use, and where they come from."""
    user_table = cache_file()
    return f"{len(_read(SHIPPED))} shipped, {len(names())} of this user ({user_table})"


def names(path: Path | None = None) -> set[str]:
    """The cases of a table; None: this machine's own."""
    path = path or cache_file()
    return set(_read(path)) if path.exists() else set()


def save(measured: dict[str, Numbers], path: Path | None = None) -> Path:
    """Add settings to a table, beside what others add meanwhile; it is written whole or not at all.

    Args:
        measured: Settings by :func:`key`.
        path: The table; None: this machine's.

    Returns:
        The file.

    Raises:
        KernelError: A table that cannot be read.
        WriteError: One that cannot be written.
    """
    path = path or cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error
    with _alone_in(path.parent):
        table = (_read(path) if path.exists() else {}) | measured
        write_text_whole(path, json.dumps(table, indent=1, sort_keys=True) + "\n")
    _forget()
    return path


def _forget() -> None:
    for clear in _caches:
        clear()


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process or thread adds to a table of the folder, where the system can lock folders."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@until_saved
def _tables(user_table: Path) -> dict[str, Numbers]:
    return _read(SHIPPED) | (_read(user_table) if user_table.exists() else {})


def _read(path: Path) -> dict[str, Numbers]:
    try:
        values = read_json(path, error=KernelError, expected="launch settings", kind=dict, max_bytes=_MAX_BYTES)
        table: dict[str, Numbers] = typed(values, dict[str, Numbers], str(path))
        for case, numbers in table.items():
            if not all(map(_is_setting, numbers.values())):
                raise ValueError(
                    f"{path}: expected numbers from 1 to {_LARGEST}, true or false for {case!r:.80}, found {numbers!r:.80}"
                )
    except (KernelError, ValueError) as error:
        raise KernelError(f"{error}; delete it to go back to the defaults") from None
    return table


def _is_setting(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, int) and 1 <= value <= _LARGEST)
