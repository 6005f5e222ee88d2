"""Features of the processor, as reported by PyTorch, and matrix products that use them.

PyTorch multiplies float32 with MKL, which uses only AVX2 on non-Intel processors. oneDNN, which PyTorch also includes, uses
AVX-512 wherever it is available: ``torch.compile`` freezes linear layers into the operation that is used here.
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
_SMALLEST = 1e-30  # avoids dividing a row of zeros by zero
_STEP, _FINE = 8, 256  # step between row counts, and the count up to which it is constant


def has(feature: str) -> bool:
    """Whether the processor has ``avx512``, ``avx512_bf16``, ``amx_tile`` or ``vnni``; False if PyTorch cannot tell."""
    return bool(getattr(torch.cpu, f"_is_{feature}_supported", bool)())


def has_onednn() -> bool:
    """Whether oneDNN is available and not disabled (``torch.backends.mkldnn``)."""
    return bool(torch.backends.mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def has_bfloat16() -> bool:
    """Whether bfloat16 products are faster than float32 ones, thanks to instructions that only oneDNN uses."""
    return (has("avx512_bf16") or has("amx_tile")) and has_onednn()


def has_int8() -> bool:
    """Whether int8 products are faster than float32 ones, thanks to instructions that only oneDNN uses."""
    return has("vnni") and has_onednn()


def prepares_int8() -> bool:
    """Whether :func:`scaled_int8` is fast, which takes AMX: without it, oneDNN falls back to plain loops for signed rows."""
    return has_int8() and has("amx_tile")


def prefers_onednn() -> bool:
    """Whether oneDNN multiplies float32 at least as fast as MKL."""
    return has("avx512") and has_onednn()


def suits_onednn(rows: Tensor) -> bool:
    """Whether oneDNN multiplies these rows at least as fast as MKL."""
    return rows.device.type == "cpu" and rows.dtype == torch.float32 and prefers_onednn()


def linear(rows: Tensor, columns: Tensor, bias: Tensor | None = None) -> Tensor:
    """``rows [..., D] @ columns.T + bias`` by oneDNN, accumulated in float32; ``columns [n, D]`` plain or :func:`packed`."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, columns, bias, "none", [], "")
    return product


def packed(columns: Tensor) -> Tensor:
    """Lay out columns for :func:`linear`; worthwhile if several products use them."""
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(columns)
    return laid_out


def scaled_int8(columns: Tensor, scales: Tensor) -> Callable[[Tensor], Tensor]:
    """Lay out int8 ``columns [n, D]`` with ``scales [n]`` once for many products; see :func:`prepares_int8`.

    Returns:
        A function from contiguous int8 rows ``[R, D]`` to float32 ``rows @ columns.T * scales``: an exact sum, rounded twice.
    """
    packed: Tensor = torch.ops.onednn.qlinear_prepack(columns, None)
    zeros = torch.zeros(len(columns), dtype=torch.int32)
    # Rows have the scale 1 and the zero point 0, and so does the result, which needs neither in float32.
    multiply = torch.ops.onednn.qlinear_pointwise
    return lambda rows: multiply(rows, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a [m, k] @ b [k, n]``, on a CPU with whichever library is faster."""
    if not suits_onednn(a):
        return a @ b
    if a.stride(1) != 1:  # oneDNN is slow with such a left operand
        return linear(b.T, a).T
    return linear(a, b.T)


def layer(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of ``x [..., D]``, on a CPU with whichever library is faster; without a gradient."""
    if not suits_onednn(x):
        return F.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    filled = F.pad(rows, (0, 0, 0, filled_rows(len(rows)) - len(rows)))
    return linear(filled, weight, bias)[: len(rows)].view(*x.shape[:-1], len(weight))


def filled_rows(rows: int) -> int:
    """Number of rows to pad to, so that a layer is called with few different row counts.

    oneDNN prepares a product for each row count and keeps the result, half a megabyte each. Captions have hundreds of token
    counts, so a server would prepare, and grow, for hours. Steps are 8 rows up to 256, then eight per doubling.
    """
    step = _STEP if rows <= _FINE else 1 << ((rows - 1).bit_length() - 4)
    return -(-rows // step) * step


def frozen_linear(
    weight: Tensor, bias: Tensor | None, activation: Activation = "none", precision: LinearPrecision = "fp32"
) -> Callable[[Tensor], Tensor]:
    """Create a linear layer for inference on a CPU, whose weight is laid out once.

    Args:
        weight: float32 ``[n, D]``. The layer keeps a copy, except in ``"fp32"`` if :func:`suits_onednn` is False.
        bias: float32 ``[n]``, or None.
        activation: Function after the layer: none, exact GELU, its tanh approximation, or swish, ``x * sigmoid(x)``.
        precision: Precision of the products. ``"bf16"`` rounds rows, weight and result to bfloat16 and accumulates in
            float32. ``"int8"`` rounds the rows of the weight once and those of the input at each call, with one scale per
            row, and accumulates integers, which is exact.

    Returns:
        A function from contiguous rows ``[R, D]`` to ``[R, n]``: bfloat16 for ``"bf16"``, otherwise float32.
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
    columns, scales = _rounded(weight)
    multiply = scaled_int8(columns, scales[:, 0]) if prepares_int8() else partial(_plain_int8, columns.T, scales.T)
    offset = weight.new_zeros(len(weight)) if bias is None else bias

    def layer(rows: Tensor) -> Tensor:
        values, row_scales = _rounded(rows)
        return _ACTIVATIONS[activation](torch.addcmul(offset, multiply(values), row_scales))

    return layer


def _plain_int8(columns: Tensor, scales: Tensor, rows: Tensor) -> Tensor:
    """``rows [R, D] @ columns [D, n] * scales [1, n]`` on any processor."""
    return torch._int_mm(rows, columns).float().mul_(scales)  # pyright: ignore[reportPrivateImportUsage]


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[R, D]`` as int8 in -127..127, and a float32 scale for each row, ``[R, 1]``."""
    # Finding both extremes is many times faster than computing the infinity norm.
    largest = torch.maximum(rows.amax(1, keepdim=True), rows.amin(1, keepdim=True).neg_())
    scales = largest.clamp_(min=_SMALLEST).div_(_LARGEST)
    return (rows / scales).round_().to(torch.int8), scales
