"""Argument checks: invalid arguments are refused by name, before they fail elsewhere. PyTorch is imported only if needed."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from finelip_fast.errors import EngineError, FineLIPError, InputError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

Embeddings: TypeAlias = "Tensor | np.ndarray[Any, Any]"

_SHORT = 80  # characters of a value that a message gives in full


def whole_number(name: str, value: Any, *, least: int | None = 1, most: int | None = None) -> int:
    """Return an integer of any library's type; booleans are refused.

    Raises:
        InputError: The value is not an integer, is below ``least`` or is above ``most``; the message gives ``name``.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise InputError(f"expected {name} to be an integer, got {value!r:.80}")
    if least is not None and number < least:
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


def seconds(name: str, value: Any) -> float:
    """Return a time limit in seconds; booleans, NaN and infinity are refused.

    Raises:
        InputError: The value is not such a number above 0; the message gives ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise InputError(f"expected {name} in seconds above 0, got {value!r:.80}")
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
    if isinstance(value, str) and len(value) <= _SHORT:
        raise InputError(f"expected {name} to be a list, got the str {value!r}; pass [{value!r}]")
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        raise InputError(f"expected {name} to be a list, got {value!r:.80}")
    return list(value)


def strings(name: str, value: Any) -> list[str]:
    """Return several strings as a list.

    Raises:
        InputError: The value is a single one, or contains something other than strings; the message gives ``name``.
    """
    values = listed(name, value)
    for text in values:
        if not isinstance(text, str):
            raise InputError(f"expected {name} of type str, got {text!r:.80}; convert it first")
    return values


def sound_text(name: str, text: Any) -> str:
    """Return a text that can be sent and stored.

    Raises:
        InputError: A value that is not a text, or a text with half of a surrogate pair; the message gives ``name``.
    """
    try:
        if isinstance(text, str):
            text.encode()
            return text
    except UnicodeEncodeError:
        pass
    raise InputError(f"expected {name} to be text that UTF-8 can hold, got {text!r:.80}")


def folder_path(name: str, value: Any) -> Path:
    """
    Raises:
        InputError: The value is not a path, or is empty; the message gives ``name``.
    """
    if not isinstance(value, (str, PathLike)):
        raise InputError(f"expected {name} to be a path, got {value!r:.80}")
    if not (path := str(value)):
        raise InputError(f"expected {name} to be a path, got ''; the working folder is '.'")
    if "\0" in path:
        raise InputError(f"expected {name} to be a path without NUL characters, got {path!r:.80}")
    return Path(value)


def floating_dtype(name: str, value: Any) -> torch.dtype:
    """
    Raises:
        InputError: The value is not a floating-point dtype; the message gives ``name``.
    """
    import torch

    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise InputError(
            f"expected {name} to be a floating-point torch.dtype, such as torch.float16, got {value!r:.80}"
        )
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


def as_embeddings(name: str, value: Any) -> Tensor:
    """Return embeddings as a dense tensor in float32, float16 or bfloat16, to which other floating-point numbers are rounded.

    An array is copied only if PyTorch cannot share its memory: if it is read-only, or has negative strides or the other byte
    order.

    Args:
        name: Name of the argument, for the message.
        value: A tensor or a NumPy array of any shape.

    Raises:
        InputError: The value is neither, is sparse, or holds something other than floating-point numbers.
    """
    import numpy as np
    import torch

    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        dtype = value.dtype.newbyteorder("=") if value.dtype.itemsize <= 4 else np.float32
        value = torch.from_numpy(np.require(value, dtype, ["C", "W"]))
    if not isinstance(value, (torch.Tensor, np.ndarray)):
        raise InputError(f"expected {name} as a tensor or an array [N, L, D], got {value!r:.80}")
    if isinstance(value, np.ndarray) or not value.is_floating_point():
        raise InputError(f"expected {name} of floating-point numbers, got {value.dtype}")
    if value.layout != torch.strided:
        raise InputError(f"expected {name} as a dense tensor, got one in {value.layout}; pass {name}.to_dense()")
    return value if value.dtype in (torch.float32, torch.float16, torch.bfloat16) else value.float()


def find_device(name: Any) -> torch.device:
    """Return the device to run on; None: a GPU if there is one.

    Raises:
        InputError: ``name`` is neither the name of a device that computes, nor the number of a GPU.
        EngineError: This machine has no such device.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(name, bool) or not isinstance(name, (int, str, torch.device)) or str(name).startswith("meta"):
        raise InputError(
            f"expected device to be 'cpu', 'cuda', 'cuda:1', a GPU's number or a torch.device, got {name!r:.80}"
        )
    kind: type[FineLIPError] = InputError
    try:
        device = torch.device(f"cuda:{name}" if isinstance(name, int) else name)
        kind = EngineError
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # the former if torch is built without CUDA
        reason = str(error).partition("\n")[0]
        if reason.startswith("Expected one of"):  # and twenty kinds, most of which no machine has
            reason = "PyTorch knows no such device"
        raise kind(
            f"device={str(name)!r:.80} cannot be used: {reason:.200}; use device='cpu', or leave it out"
        ) from None
    return device
