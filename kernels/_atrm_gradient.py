"""The gradient of token aggregation in plain PyTorch, on any device; nothing is kept from the forward pass.

With the logits ``l``, their softmax over the tokens ``w``, ``p = w.T @ x`` and a gradient ``g`` of the result::

    dp = gradient of p through the L2 norm        dw = x @ dp.T
    dl = w * (dw - sum over tokens of w * dw)     dx = w @ dp, and what comes back through the logits
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from finelip_fast.kernels.atrm import LAYER_NORM_EPS, aggregation_weights

_NORMALIZE_EPS = 1e-12  # of F.normalize


def gradient(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    scale: Tensor,
    lengths: Tensor | None,
    anchor: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`finelip_fast.kernels.atrm`'s tensors, in float32 inside.

    Args:
        grad_out: ``[B, K + 1, D]``.
        x, norm_weight, norm_bias, w1, b1, w2, b2, scale, lengths, anchor: What the forward pass was given.

    Returns:
        Gradients of ``x``, ``norm_weight``, ``norm_bias``, ``w1``, ``b1``, ``w2``, ``b2``, ``scale`` and ``anchor``, each in
        its tensor's shape and dtype. That of tokens at and after their item's length is 0.
    """
    inputs = (x, norm_weight, norm_bias, w1, b1, w2, b2, scale, anchor)
    grad_out, x, norm_weight, norm_bias, w1, b1, w2, b2, scale, anchor = (t.float() for t in (grad_out, *inputs))
    factor = scale.reshape(())
    x, weights, valid = aggregation_weights(x, norm_weight, norm_bias, w1, b1, w2, b2, factor, lengths)
    grad_pooled = _through_norm(grad_out[:, 1:], weights.transpose(1, 2) @ x)
    grad_weights = x @ grad_pooled.transpose(1, 2)  # [B, N, K]
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum(dim=1, keepdim=True))

    normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, LAYER_NORM_EPS)
    before = F.linear(normed, w1, b1)
    hidden = F.gelu(before)
    grad_linear = grad_logits * factor
    grad_before = torch.ops.aten.gelu_backward(grad_linear @ w2, before)
    grad_tokens, grad_norm_weight, grad_norm_bias = torch.ops.aten.native_layer_norm_backward(
        grad_before @ w1, x, x.shape[-1:], mean, rstd, norm_weight, norm_bias, [True, True, True]
    )
    grad_x = grad_tokens + weights @ grad_pooled
    grads = (
        grad_x if valid is None else grad_x.masked_fill(~valid, 0.0),
        grad_norm_weight,
        grad_norm_bias,
        torch.einsum("bnh,bnd->hd", grad_before, normed),
        grad_before.sum(dim=(0, 1)),
        torch.einsum("bnk,bnh->kh", grad_linear, hidden),
        grad_linear.sum(dim=(0, 1)),
        (grad_logits * F.linear(hidden, w2, b2)).sum(),
        _through_norm(grad_out[:, 0], anchor),
    )
    gx, gnw, gnb, gw1, gb1, gw2, gb2, gs, ga = (
        grad.to(t.dtype).reshape(t.shape) for grad, t in zip(grads, inputs, strict=True)
    )
    return gx, gnw, gnb, gw1, gb1, gw2, gb2, gs, ga


def _through_norm(grad: Tensor, rows: Tensor) -> Tensor:
    """Through ``rows / max(|rows|, eps)``, row by row."""
    norm = rows.norm(dim=-1, keepdim=True)
    clamped = norm.clamp_min(_NORMALIZE_EPS)
    unit = rows / clamped
    along = (unit * grad).sum(dim=-1, keepdim=True).masked_fill(norm <= _NORMALIZE_EPS, 0.0)
    return (grad - unit * along) / clamped
