"""Argument checks: invalid arguments are refused by name, before they fail elsewhere. PyTorch is imported only if needed."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finelip_fast.errors import EngineError, InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def whole_number(name: str, value: Any, *, least: int = 1, most: int | None = None) -> int:
    """Return an integer of any library's type; booleans are refused.

    Raises:
        InputError: The value is not an integer, is below ``least`` or is above ``most``; the message gives ``name``.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise InputError(f"expected {name} as a whole number, got {value!r:.80}")
    if number < least:
        raise InputError(f"expected {name} of at least {least}, got {number}")
    if most is not None and number > most:
        raise InputError(f"expected {name} of at most {most}, got {number}")
    return number


def share(name: str, value: Any) -> float:
    """Return a number from 0 to 1; booleans and NaN are refused.

    Raises:
        InputError: The value is not such a number; the message gives ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise InputError(f"expected {name} in [0, 1], got {value!r:.80}")
    return float(value)


def one_of(name: str, value: Any, known: Collection[str]) -> None:
    """
    Raises:
        InputError: The value is not one of the known strings; the message gives ``name``.
    """
    if not isinstance(value, str) or value not in known:
        raise InputError(f"expected {name} to be one of {', '.join(known)}, got {value!r:.80}")


def listed(name: str, value: Any) -> list[Any]:
    """Return several values as a list; a string or a dictionary counts as a single value.

    Raises:
        InputError: The value is a single one; the message gives ``name``.
    """
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        raise InputError(f"expected {name} as a list, got {value!r:.80}")
    return list(value)


def strings(name: str, value: Any) -> list[str]:
    """Return several strings as a list.

    Raises:
        InputError: The value is a single one, or contains something other than strings; the message gives ``name``.
    """
    values = listed(name, value)
    for text in values:
        if not isinstance(text, str):
            raise InputError(f"expected {name} as str, got {text!r:.80}; convert it first")
    return values


def folder_path(name: str, value: Any) -> Path:
    """
    Raises:
        InputError: The value is not a path; the message gives ``name``.
    """
    if not isinstance(value, (str, PathLike)):
        raise InputError(f"expected {name} as a path, got {value!r:.80}")
    if "\0" in (path := str(value)):
        raise InputError(f"expected {name} as a path, which has no NUL, got {path!r:.80}")
    return Path(value)


def floating_dtype(name: str, value: Any) -> torch.dtype:
    """
    Raises:
        InputError: The value is not a floating-point dtype; the message gives ``name``.
    """
    import torch

    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise InputError(f"expected {name} as a floating dtype of torch, got {value!r:.80}")
    return value


def matrices(name: str, value: Any, shape: tuple[int, int, int]) -> Tensor:
    """
    Raises:
        InputError: The value is not a tensor of that shape; the message gives ``name``.
    """
    from torch import Tensor

    if not isinstance(value, Tensor) or value.shape != shape:
        got = list(value.shape) if isinstance(value, Tensor) else f"{value!r:.80}"
        raise InputError(f"expected {name} as a tensor {list(shape)}, got {got}")
    return value


def find_device(name: Any) -> torch.device:
    """Return the device to run on; None: a GPU if there is one.

    Raises:
        InputError: ``name`` is not the name of a device.
        EngineError: This machine has no such device.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(name, (str, torch.device)):
        raise InputError(f"expected device as cpu, cuda, cuda:1 or a torch.device, got {name!r:.80}")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # the former if torch is built without CUDA
        reason = str(error).partition("\n")[0]
        if reason.startswith("Expected one of"):  # and twenty kinds, most of which no machine has
            reason = "PyTorch knows no such device"
        raise EngineError(
            f"device={str(name)!r:.80} cannot be used: {reason:.200}; use device='cpu', or leave it out"
        ) from None
    return device
