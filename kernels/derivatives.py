"""Derivatives that a registered operation lacks, computed from its reference.

A registered operation has only a first-order gradient. PyTorch passes it neither tangents nor the tensors of ``torch.func``'s
transformations, so it would silently return a derivative of zero. The public functions therefore check :func:`transformed`
and run their references, which PyTorch can differentiate in any way. A gradient that is itself to be differentiated also
comes from the reference, through :func:`again`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.autograd import forward_ad

from finelip_fast.errors import KernelError


def transformed() -> bool:
    """Whether tensors may carry tangents or belong to a transformation (``jvp``, ``grad``, ``vmap`` or one built on them)."""
    # Checked for the thread, not for each tensor: this takes a tenth of a microsecond, and torch.compile guards on it.
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def again(reference: Callable[..., Tensor], grad_result: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Compute the gradients of ``inputs`` from the reference, with operations that can be differentiated again."""
    gradients: tuple[Tensor, ...] = torch.func.vjp(reference, *inputs)[1](grad_result)
    return gradients


def refuse(name: str, instead: str, *tensors: Any) -> None:
    """Refuse to differentiate an operation; ``tensors`` are tensors, sequences of tensors, or anything else.

    Raises:
        KernelError: A tensor is being transformed: its derivative would be taken to be zero.
    """
    if transformed() and any(map(_carries, tensors)):
        raise KernelError(f"{name} has no derivative and does not support jvp, grad or vmap; {instead}")


def _carries(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_carries, value))
    return isinstance(value, Tensor) and (
        is_functorch_wrapped_tensor(value) or forward_ad.unpack_dual(value).tangent is not None
    )
