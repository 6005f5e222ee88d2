"""What the processor multiplies fast, asked of PyTorch, and products that use it.

PyTorch multiplies float32 by MKL, which keeps to AVX2 on processors that are not Intel's. oneDNN, which PyTorch carries too,
has AVX-512 on all that have it: ``torch.compile`` freezes linear layers into the operation that is used here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["none", "gelu", "gelu_tanh", "swish"]
LinearPrecision = Literal["fp32", "bf16", "int8"]

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "swish": F.silu,
}
_LARGEST = 127
_SMALLEST = 1e-30  # what a row of zeros is divided by
_STEP, _FINE = 8, 256  # of numbers of rows, and up to which number the step stays


def has(feature: str) -> bool:
    """Whether the processor has ``avx512``, ``avx512_bf16``, ``amx_tile``, ``vnni``; no, if PyTorch cannot say."""
    return bool(getattr(torch.cpu, f"_is_{feature}_supported", bool)())


def has_onednn() -> bool:
    """Whether oneDNN is there and not switched off (``torch.backends.mkldnn``)."""
    return bool(torch.backends.mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def has_bfloat16() -> bool:
    """Whether a product of bfloat16 rows is faster than one of float32, by instructions that oneDNN alone uses."""
    return (has("avx512_bf16") or has("amx_tile")) and has_onednn()


def suits_onednn(rows: Tensor) -> bool:
    """Whether these are multiplied by oneDNN at least as fast as by MKL."""
    return rows.device.type == "cpu" and rows.dtype == torch.float32 and has("avx512") and has_onednn()


def linear(rows: Tensor, columns: Tensor, bias: Tensor | None = None) -> Tensor:
    """``rows [..., D] @ columns.T + bias`` by oneDNN, added up in float32; ``columns [n, D]`` plain or :func:`packed`."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, columns, bias, "none", [], "")
    return product


def packed(columns: Tensor) -> Tensor:
    """Laid out for :func:`linear`: worth it where several products use them."""
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(columns)
    return laid_out


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a [m, k] @ b [k, n]``, on a CPU by whichever library is faster."""
    if not suits_onednn(a):
        return a @ b
    if a.stride(1) != 1:  # oneDNN is slow with such a left side
        return linear(b.T, a).T
    return linear(a, b.T)


def layer(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of ``x [..., D]``, on a CPU by whichever library is faster; without a gradient."""
    if not suits_onednn(x):
        return F.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    filled = F.pad(rows, (0, 0, 0, filled_rows(len(rows)) - len(rows)))
    return linear(filled, weight, bias)[: len(rows)].view(*x.shape[:-1], len(weight))


def filled_rows(rows: int) -> int:
    """How many rows to fill up to, so that a layer meets few numbers of them.

    oneDNN prepares a product for its number of rows, and keeps what it prepared, half a megabyte each. Captions come in
    hundreds of numbers of tokens: a server would prepare, and grow, for hours. Steps of 8 up to 256, then eight to a doubling.
    """
    step = _STEP if rows <= _FINE else 1 << ((rows - 1).bit_length() - 4)
    return -(-rows // step) * step


def frozen_linear(
    weight: Tensor, bias: Tensor | None, activation: Activation = "none", precision: LinearPrecision = "fp32"
) -> Callable[[Tensor], Tensor]:
    """A linear layer for inference on a CPU, whose weight is laid out once.

    Args:
        weight: float32 ``[n, D]``. What the layer keeps is a copy, except in ``"fp32"`` where :func:`suits_onednn` says no.
        bias: float32 ``[n]``, or None.
        activation: What follows the layer: nothing, exact GELU, its tanh approximation, or swish, ``x * sigmoid(x)``.
        precision: Precision of the products. ``"bf16"`` rounds rows, weight and result to bfloat16, and adds up in float32.
            ``"int8"`` rounds rows of the weight once and rows of the input as they come, each with a scale, and adds up whole
            numbers: exact from there on.

    Returns:
        A function of rows ``[R, D]``, contiguous, to ``[R, n]``: bfloat16 for ``"bf16"``, else float32.
    """
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if precision == "int8":
        return _int8_linear(weight, bias, activation)
    if precision == "fp32" and not suits_onednn(weight):
        return lambda rows: _ACTIVATIONS[activation](F.linear(rows, weight, bias))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    columns, bias = packed(weight.to(dtype)), None if bias is None else bias.to(dtype)
    product = torch.ops.mkldnn._linear_pointwise
    name, _, algorithm = activation.partition("_")
    return lambda rows: product(rows.to(dtype), columns, bias, name, [], algorithm or "none")


def _int8_linear(weight: Tensor, bias: Tensor | None, activation: Activation) -> Callable[[Tensor], Tensor]:
    values, scales = _rounded(weight)
    columns, scales = values.T, scales.T
    offset = weight.new_zeros(len(weight)) if bias is None else bias

    def layer(rows: Tensor) -> Tensor:
        values, row_scales = _rounded(rows)
        integers = torch._int_mm(values, columns)  # pyright: ignore[reportPrivateImportUsage]
        result = torch.addcmul(offset, integers.float().mul_(scales), row_scales)
        return _ACTIVATIONS[activation](result)

    return layer


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``[R, D]`` as int8 in -127..127, and a float32 scale ``[R, 1]`` for each row."""
    # Both extremes are found many times as fast as the norm of infinite order is.
    largest = torch.maximum(rows.amax(1, keepdim=True), rows.amin(1, keepdim=True).neg_())
    scales = largest.clamp_(min=_SMALLEST).div_(_LARGEST)
    return (rows / scales).round_().to(torch.int8), scales
