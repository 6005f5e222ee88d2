"""Parts shared by the kernels of token aggregation and its gradient: softmax over an item's tokens, and the weighted sum."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from finelip_fast.errors import KernelError

NORMALIZE_EPS = tl.constexpr(1e-12)  # of F.normalize
# Below every logit, yet finite: lanes without a token then need no guard against inf - inf.
LOWEST = tl.constexpr(-3.0e38)

# Explicit, because Triton 3.9 warns if it is omitted, and 3.10 changes the default.
LAUNCH_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}

# The smallest side of a matrix product on tensor cores.
SMALLEST_TILE = 16


@triton.jit
def valid_tokens(lengths, item, tokens):
    """How many tokens of the item count; never more than there are, whatever `lengths` says."""
    length = tokens
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + item), tokens).to(tl.int32)
    return length


@triton.jit
def load_logits(logits, n, k, length, K: tl.constexpr):
    """A tile ``[n, k]`` of one item's logits, `n` and `k` of any orientation; :data:`LOWEST` where there is none."""
    return tl.load(logits + n * K + k, mask=(n < length) & (k < K), other=LOWEST)


@triton.jit
def softmax_statistics(logits, k, length, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Over one item's tokens, for each `k`: the largest logit, and the sum of ``exp(logit - largest)``."""
    largest = tl.full([BLOCK_K], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, length, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        tile = load_logits(logits, n[None, :], k[:, None], length, K)
        larger = tl.maximum(largest, tl.max(tile, axis=1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(tile - larger[:, None]), axis=1)
        largest = larger
    return largest, total


@triton.jit
def pooled_sum(
    rows,
    stride_token,
    logits,
    k,
    largest,
    length,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    dtype: tl.constexpr,
    precision: tl.constexpr,
):
    """``exp(logits - largest).T @ x`` of one item, ``[BLOCK_K, D]`` as a tuple of ``[BLOCK_K, BLOCK_D]``.

    A tuple, because a tensor's sides are powers of two and ``D`` is not.
    """
    d = tl.arange(0, BLOCK_D)[None, :]
    sums = ()
    for _ in tl.static_range(0, D, BLOCK_D):
        sums = sums + (tl.zeros([BLOCK_K, BLOCK_D], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for start in range(0, length, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        weights = tl.exp(load_logits(logits, n[None, :], k[:, None], length, K) - largest[:, None]).to(dtype)
        tokens = (rows + n.to(tl.int64) * stride_token)[:, None]
        valid = (n < length)[:, None]
        added = ()
        for chunk in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
            columns = chunk * BLOCK_D + d
            x = tl.load(tokens + columns, mask=valid & (columns < D), other=0.0).to(dtype)
            added = added + (tl.dot(weights, x, sums[chunk], input_precision=precision),)  # type: ignore[assignment]  # noqa: RUF005
        sums = added
    return sums


INTERPRETED = not isinstance(pooled_sum, triton.JITFunction)  # TRITON_INTERPRET=1: kernels run on the CPU


def capability_of(device: torch.device) -> int:
    """Compute capability of a GPU, 90 for 9.0; also 90 for the interpreter.

    Raises:
        KernelError: No GPU.
    """
    if INTERPRETED:
        return 90
    if device.type != "cuda":
        raise KernelError(f"expected tensors on a CUDA device, got {device}: use finelip_fast.kernels.atrm")
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def has_own_products(device: torch.device) -> bool:
    """Whether matrix products run asynchronously, while the program continues: on Hopper and data-centre Blackwell."""
    return INTERPRETED or torch.cuda.get_device_capability(device)[0] in (9, 10, 11)


def power_of_two(size: int) -> int:
    """Smallest side of a tile that holds `size`."""
    return max(SMALLEST_TILE, int(triton.next_power_of_2(size)))


def unit_stride(tensor: Tensor) -> Tensor:
    """`tensor`, copied if its last dimension is strided."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
