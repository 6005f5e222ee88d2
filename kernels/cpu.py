"""What the processor multiplies fast, asked of PyTorch, and products that use it.

PyTorch multiplies float32 by MKL, which keeps to AVX2 on processors that are not Intel's. oneDNN, which PyTorch carries too,
has AVX-512 on all that have it: ``torch.compile`` freezes linear layers into the operation that is used here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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


def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.linear``, on a CPU by whichever library is faster; without a gradient."""
    return linear(x, weight, bias) if suits_onednn(x) else F.linear(x, weight, bias)
