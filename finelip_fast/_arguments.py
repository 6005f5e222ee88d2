"""Arguments: refused by their names where they are given, not where they fail. PyTorch is imported by what needs it."""

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
    """An integer of any library, no truth value.

    Raises:
        InputError: Something else, or one below ``least`` or above ``most``; says what it is called.
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
    """A number from 0 to 1, no truth value and no NaN.

    Raises:
        InputError: Something else; says what it is called.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise InputError(f"expected {name} in [0, 1], got {value!r:.80}")
    return float(value)


def one_of(name: str, value: Any, known: Collection[str]) -> None:
    """
    Raises:
        InputError: None of the known texts; says what it is called.
    """
    if not isinstance(value, str) or value not in known:
        raise InputError(f"expected {name} to be one of {', '.join(known)}, got {value!r:.80}")


def listed(name: str, value: Any) -> list[Any]:
    """Several values as a list; a text or a dictionary is one value.

    Raises:
        InputError: One value; says what it is called.
    """
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        raise InputError(f"expected {name} as a list, got {value!r:.80}")
    return list(value)


def strings(name: str, value: Any) -> list[str]:
    """Several strings as a list.

    Raises:
        InputError: One value, or something else among them; says what it is called.
    """
    values = listed(name, value)
    for text in values:
        if not isinstance(text, str):
            raise InputError(f"expected {name} as str, got {text!r:.80}; convert it first")
    return values


def folder_path(name: str, value: Any) -> Path:
    """
    Raises:
        InputError: No path; says what it is called.
    """
    if not isinstance(value, (str, PathLike)):
        raise InputError(f"expected {name} as a path, got {value!r:.80}")
    if "\0" in (path := str(value)):
        raise InputError(f"expected {name} as a path, which has no NUL, got {path!r:.80}")
    return Path(value)


def floating_dtype(name: str, value: Any) -> torch.dtype:
    """
    Raises:
        InputError: No dtype of floating-point numbers; says what it is called.
    """
    import torch

    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise InputError(f"expected {name} as a floating dtype of torch, got {value!r:.80}")
    return value


def matrices(name: str, value: Any, shape: tuple[int, int, int]) -> Tensor:
    """
    Raises:
        InputError: No tensor of that shape; says what it is called.
    """
    from torch import Tensor

    if not isinstance(value, Tensor) or value.shape != shape:
        got = list(value.shape) if isinstance(value, Tensor) else f"{value!r:.80}"
        raise InputError(f"expected {name} as a tensor {list(shape)}, got {got}")
    return value


def find_device(name: Any) -> torch.device:
    """The device to run on; None: a GPU if there is one.

    Raises:
        InputError: ``name`` is no name of a device.
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
    except (AssertionError, RuntimeError) as error:  # the former where torch is built without CUDA
        reason = str(error).partition("\n")[0]
        raise EngineError(
            f"device={str(name)!r:.80} cannot be used: {reason:.200}; use device='cpu', or leave it out"
        ) from None
    return device
