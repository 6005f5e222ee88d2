"""Registration of operations with PyTorch, so that graphs, autograd and ``torch.compile`` know them as one node each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def operation(name: str, schema: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function of tensors and numbers, which becomes an operation that runs on every device.

    :func:`torch.library.custom_op` does the same, but its first call imports PyTorch's compiler, which takes a second.

    Args:
        name: Name with its namespace, as in ``"finelip::clim_scores"``; :func:`fake` and
            ``torch.library.register_autograd`` take it, too.
        schema: Types and names of inputs and outputs in PyTorch's notation; None: those of the function's annotations.
    """
    namespace, _, own_name = name.partition("::")

    def register(function: Callable[..., Any]) -> Any:
        torch.library.define(name, schema or torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(name, "default")(_not_compiled(function))
        return getattr(getattr(torch.ops, namespace), own_name).default

    return register


def fake(name: str) -> Callable[[F], F]:
    """Decorate a function from an operation's inputs to empty outputs of the right shapes, dtypes and device."""
    return cast("Callable[[F], F]", torch.library.register_fake(name))


def _not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the compiler out of a function that compiled code calls: it would compile the inside of a single node."""

    @cache
    def disabled() -> Callable[..., Any]:
        guarded: Callable[..., Any] = torch.compiler.disable(function)
        return guarded

    @wraps(function)
    def call(*arguments: Any) -> Any:
        return disabled()(*arguments) if "torch._dynamo" in sys.modules else function(*arguments)

    return call
