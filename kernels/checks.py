"""Argument checks for the public functions, so that no data is dropped, read from the wrong memory or guessed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finelip_fast._arguments import share
from finelip_fast.errors import InputError

_COUNTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_tensor(name: str, value: Any, device: torch.device | None = None) -> None:
    """Reject anything but a dense tensor, on ``device`` if given: a kernel would read memory outside the tensor."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        got = value.layout if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"expected {name} as a dense torch.Tensor, got {got}")
    if device is not None and value.device != device:
        raise InputError(f"expected all tensors on one device, got {name} on {value.device} and others on {device}")


def check_floats(name: str, value: Any, device: torch.device | None = None) -> None:
    """Reject anything but a dense tensor of a float dtype: imaginary parts would be dropped, results truncated."""
    check_tensor(name, value, device)
    if not value.is_floating_point():
        raise InputError(f"expected {name} in a float dtype, got {value.dtype}: {_conversion(value, 'float')}")


def check_counts(name: str, value: Any, device: torch.device) -> None:
    """Reject anything but a dense tensor of integers."""
    check_tensor(name, value, device)
    if value.dtype not in _COUNTS:
        raise InputError(f"expected {name} in an integer dtype, got {value.dtype}: {_conversion(value, 'long')}")


def _conversion(value: Tensor, method: str) -> str:
    return f"convert its real part (.real.{method}())" if value.is_complex() else f"convert it (.{method}())"


def check_alpha(alpha: Any) -> None:
    """Reject anything that is not a weight, including a tensor, whose gradient would be lost."""
    if isinstance(alpha, Tensor):
        raise InputError(
            "expected alpha as a number, got a tensor, which would get no gradient: float(alpha), or for a weight that learns"
            " alpha * clim_scores(..., alpha=1.0) + (1 - alpha) * clim_scores(..., alpha=0.0)"
        )
    share("alpha", alpha)
