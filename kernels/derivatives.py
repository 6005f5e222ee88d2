"""Derivatives that a registered operation does not have, taken of its reference.

A registered operation knows its gradient, once. PyTorch gives it neither tangents nor the tensors of ``torch.func``'s
transformations: it would return a derivative of zero without a word. So the public functions ask :func:`transformed` and run
their references, which PyTorch differentiates as it likes, and a gradient that is itself to be differentiated is :func:`again`
the reference's.
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
    """Whether tensors may carry tangents or be those of a transformation (``jvp``, ``grad``, ``vmap`` and what they make)."""
    # Asked of the thread and not of each tensor: it takes a tenth of a microsecond, and torch.compile guards on it.
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def again(reference: Callable[..., Tensor], grad_result: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The gradients of ``inputs`` by the reference, in operations that can be differentiated again."""
    gradients: tuple[Tensor, ...] = torch.func.vjp(reference, *inputs)[1](grad_result)
    return gradients


def refuse(name: str, instead: str, *tensors: Any) -> None:
    """Refuse to differentiate an operation; ``tensors`` are tensors, sequences of them, or anything else.

    Raises:
        KernelError: A tensor that is being transformed: a derivative would be taken for zero.
    """
    if transformed() and any(map(_carries, tensors)):
        raise KernelError(
            f"{name} has no derivative, and takes no tensors that are transformed by jvp, grad or vmap: {instead}"
        )


def _carries(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_carries, value))
    return isinstance(value, Tensor) and (
        is_functorch_wrapped_tensor(value) or forward_ad.unpack_dual(value).tangent is not None
    )
