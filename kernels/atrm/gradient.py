"""The gradient of token aggregation; the operation is defined in :mod:`finelip_fast.kernels.atrm.formula`.

Nothing is kept from the forward pass. For one item with logits ``l [N, K]``, ``w = softmax(l)`` over the tokens,
``p = w.T @ x``, ``r = max(|p|, eps)`` and the incoming gradient ``g``::

    dp  = (g - p (p . g) / r^2) / r        through the norm, row by row
    dl  = w * (x @ dp.T - p . dp)          through the softmax; p . dp is 0 unless the norm was below eps
    dx  = w @ dp                           the direct part; the rest comes through the logits

The logits themselves, and the path from ``dl`` back through the linear layers and LayerNorm, are dense products over all
tokens. The steps in between are plain PyTorch here, and two launches in ``gradient_triton.py``. Everything is float32 and runs
on blocks of items, so that intermediate results are bounded and, on a CPU, stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from finelip_fast.kernels.atrm.formula import LAYER_NORM_EPS, AtrmInputs

_NORMALIZE_EPS = 1e-12  # of F.normalize

# Elements of x in one block of items, 4 MiB in float32; about five such tensors live at a time.
_BLOCK_ELEMENTS = 1 << 20

# From grad_out, x, logits, lengths to the module's dl [B, N, K] and the direct part of dx [B, N, D]; float32 but for grad_out.
ThroughSoftmax = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def gradient(
    grad_out: Tensor,
    inputs: AtrmInputs,
    *,
    through_softmax: ThroughSoftmax | None = None,
    block_elements: int | None = None,
) -> Gradients:
    """Compute the gradients of the tensors of :func:`finelip_fast.kernels.atrm`.

    Args:
        grad_out: ``[B, K + 1, D]``, any strides.
        inputs: Inputs of the forward pass.
        through_softmax: Function for the steps in between; None means plain PyTorch.
        block_elements: Elements of ``x`` in one block; None means as many as suit a CPU.

    Returns:
        Gradients of ``x``, ``norm_weight``, ``norm_bias``, ``w1``, ``b1``, ``w2``, ``b2``, ``scale`` and ``anchor``, each in
        its tensor's shape and dtype. The gradient of tokens at and after their item's length is 0.
    """
    x, lengths, anchor = inputs.x, inputs.lengths, inputs.anchor
    items, tokens, width = x.shape
    through_softmax = through_softmax or _through_softmax
    parameters = inputs[1:8]
    wide = [parameter.float() for parameter in parameters]
    grads = [torch.zeros_like(parameter) for parameter in wide]
    grad_x = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    block = max(1, (block_elements or _BLOCK_ELEMENTS) // max(1, tokens * width))
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, items, block):
            block_rows = slice(start, start + block)
            counts = None if lengths is None else lengths[block_rows].contiguous()
            # On a GPU, the host would have to wait for it.
            longest = int(counts.amax()) if counts is not None and x.device.type == "cpu" else tokens
            grad_block, added = _of_some_items(
                grad_out[block_rows], x[block_rows, :longest], wide, counts, through_softmax
            )
            grad_x[block_rows, :longest] = grad_block
            for total, addend in zip(grads, added, strict=True):
                total += addend
        grad_anchor = _through_norm(grad_out[:, 0].float(), anchor.float()).to(anchor.dtype)
    gnw, gnb, gw1, gb1, gw2, gb2, gs = (grad.to(p.dtype) for grad, p in zip(grads, parameters, strict=True))
    return grad_x, gnw, gnb, gw1, gb1, gw2, gb2, gs, grad_anchor


def _of_some_items(
    grad_out: Tensor, x: Tensor, parameters: list[Tensor], lengths: Tensor | None, through_softmax: ThroughSoftmax
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of ``x`` and of the parameters, all float32 like the parameters."""
    norm_weight, norm_bias, w1, b1, w2, b2, scale = parameters
    x = _without_padding(x, lengths)
    flat, width = x.flatten(0, 1), x.shape[2:]
    normed, mean, rstd = torch.native_layer_norm(flat, width, norm_weight, norm_bias, LAYER_NORM_EPS)
    before = F.linear(normed, w1, b1)
    hidden = F.gelu(before)
    linear = F.linear(hidden, w2, b2)
    factor = scale.reshape(())
    grad_logits, grad_x = through_softmax(grad_out, x, (linear * factor).unflatten(0, x.shape[:2]), lengths)
    grad_logits = grad_logits.flatten(0, 1)
    grad_linear = grad_logits * factor
    grad_before = torch.ops.aten.gelu_backward(grad_linear @ w2, before)
    grad_flat, grad_norm_weight, grad_norm_bias = torch.ops.aten.native_layer_norm_backward(
        grad_before @ w1, flat, width, mean, rstd, norm_weight, norm_bias, [True, True, True]
    )
    return grad_x.add_(grad_flat.view_as(x)), [
        grad_norm_weight,
        grad_norm_bias,
        grad_before.T @ normed,
        grad_before.sum(dim=0),
        grad_linear.T @ hidden,
        grad_linear.sum(dim=0),
        (grad_logits * linear).sum().reshape(scale.shape),
    ]


def _through_softmax(grad_out: Tensor, x: Tensor, logits: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    padding = _padding(x, lengths)
    if padding is not None:
        logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
    weights = logits.softmax(dim=1)
    if padding is not None:
        weights = weights.masked_fill(padding, 0.0)  # for an item without tokens, they were equal
    pooled = weights.transpose(1, 2) @ x
    grad_pooled = _through_norm(grad_out[:, 1:].float(), pooled)
    along = (pooled * grad_pooled).sum(dim=2)
    grad_logits = weights * (x @ grad_pooled.transpose(1, 2) - along[:, None])
    return grad_logits, weights @ grad_pooled


def _through_norm(grad: Tensor, rows: Tensor) -> Tensor:
    """Backpropagate through ``rows / max(|rows|, eps)``, row by row."""
    norm = rows.norm(dim=-1, keepdim=True)
    clamped = norm <= _NORMALIZE_EPS
    norm = norm.clamp_min(_NORMALIZE_EPS)
    unit = rows / norm
    along = (unit * grad).sum(dim=-1, keepdim=True).masked_fill(clamped, 0.0)
    through: Tensor = (grad - unit * along) / norm
    return through


def _padding(x: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Mask ``[B, N, 1]``, True for padding."""
    return None if lengths is None else (torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None]


def _without_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """``x [B, N, D]`` in float32, contiguous, and 0 at and after each length: zero times a NaN would be NaN."""
    x = x.float().contiguous()
    padding = _padding(x, lengths)
    return x if padding is None else x.masked_fill(padding, 0.0)
