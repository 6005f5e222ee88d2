"""Launch settings that were measured: those shipped with the package, and those that tuning wrote on this machine.

A table is a JSON object from keys to settings. A key names the operation, the GPU's compute capability, the dtype and the
sizes that matter: ``"clim sm_90 float16 D=512 L=40 Q=1"``. What is in no table runs with the defaults of its kernel's file;
nothing is ever tuned during a search.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from finelip_fast._errors import KernelError

SHIPPED = Path(__file__).with_name("settings.json")

Numbers = dict[str, int]  # of a settings dataclass, by field
S = TypeVar("S")


def cache_folder() -> Path:
    """Where this user's own files lie: ``FINELIP_CACHE``, or ``~/.cache/finelip_fast``."""
    return Path(os.environ.get("FINELIP_CACHE") or Path.home() / ".cache" / "finelip_fast")


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
        return None if numbers is None else kind(**numbers)
    except TypeError as error:
        raise KernelError(
            f"the launch settings of {case!r} are not this version's: {error}; tune again, or delete {cache_file()}"
        ) from error


def summary() -> str:
    """How many settings are in use, and where they come from."""
    own = cache_file()
    return f"{len(_read(SHIPPED))} shipped, {len(names())} of this user ({own})"


def names(path: Path | None = None) -> set[str]:
    """The cases of a table; None: this machine's own."""
    path = path or cache_file()
    return set(_read(path)) if path.exists() else set()


def save(found: dict[str, Numbers], path: Path | None = None) -> Path:
    """Add settings to a table; it is written whole or not at all.

    Args:
        found: Settings by :func:`key`.
        path: The table; None: this machine's.

    Returns:
        The file.
    """
    path = path or cache_file()
    table = (_read(path) if path.exists() else {}) | found
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)
    _tables.cache_clear()
    return path


@functools.cache
def _tables(own: Path) -> dict[str, Numbers]:
    return _read(SHIPPED) | (_read(own) if own.exists() else {})


def _read(path: Path) -> dict[str, Numbers]:
    try:
        table: dict[str, Numbers] = json.loads(path.read_text(encoding="utf-8"))
        table.items()
    except (OSError, ValueError, AttributeError) as error:
        raise KernelError(
            f"cannot read launch settings from {path}: {error}; delete it to go back to the defaults"
        ) from error
    return table
