"""Measured launch settings: those shipped with the package, and those that tuning wrote on this machine.

A table is a JSON object that maps keys to settings. A key names the operation, the GPU's compute capability, the dtype and the
relevant sizes: ``"clim sm_90 float16 D=512 L=40 Q=1"``. A case that is in no table runs with the defaults in its kernel's
file; nothing is ever tuned during a search.
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
_LARGEST = 1 << 16  # larger than any block on any GPU

SHIPPED = Path(__file__).with_name("settings.json")

Numbers = dict[str, Any]  # fields of a settings dataclass: integers and booleans
S = TypeVar("S")
F = TypeVar("F", bound=Callable[..., Any])

_caches: list[Callable[[], None]] = []


def until_saved(function: F) -> F:
    """Cache results until :func:`save`, so that tuned settings apply at once, even in the process that tuned them."""
    cached: Any = functools.cache(function)
    _caches.append(cached.cache_clear)
    return cached  # type: ignore[no-any-return]


def cache_file() -> Path:
    """File that tuning writes."""
    return cache_folder() / "settings.json"


def key(operation: str, *, capability: int, dtype: torch.dtype, **sizes: int) -> str:
    """Name of a case, with sizes in the order given."""
    numbers = " ".join(f"{name}={value}" for name, value in sizes.items())
    return f"{operation} sm_{capability} {str(dtype).removeprefix('torch.')} {numbers}"


def tuned(case: str, kind: Callable[..., S]) -> S | None:
    """Settings of a case: this machine's own, otherwise the shipped ones, or None if neither exist.

    Args:
        case: Name from :func:`key`.
        kind: Dataclass of the kernel's settings.

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
        _forget()  # the table may be repaired while this process runs
        raise KernelError(
            f"the launch settings of {case!r} are from another version: {error}; tune again, or delete {cache_file()}"
        ) from error


def summary() -> str:
    """Describe how many settings are in use, and where they come from."""
    user_table = cache_file()
    return f"{len(_read(SHIPPED))} shipped, {len(names())} of this user ({user_table})"


def names(path: Path | None = None) -> set[str]:
    """Names of the cases in a table; None means this machine's own."""
    path = path or cache_file()
    return set(_read(path)) if path.exists() else set()


def save(measured: dict[str, Numbers], path: Path | None = None) -> Path:
    """Add settings to a table, keeping additions by others; the file is written completely or not at all.

    Args:
        measured: Settings by :func:`key`.
        path: File of the table; None means this machine's own.

    Returns:
        The file.

    Raises:
        KernelError: The table cannot be read.
        WriteError: The table cannot be written.
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
    """Lock a folder, if the system can, so that no other process or thread adds to its tables meanwhile."""
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
