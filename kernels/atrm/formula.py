"""Token aggregation (ATRM, adaptive token refinement): ``N`` token features become ``K`` unit rows and an anchor row.

For token features ``x [N, D]`` of one picture or caption (FineLIP, arXiv 2504.01916, section 3)::

    H       = GELU(LayerNorm(x) @ W1.T + b1)       W1 [h, D], exact GELU, eps 1e-5
    logits  = (H @ W2.T + b2) * scale              W2 [K, h]
    weights = softmax(logits over the tokens)      one distribution per aggregated token
    out     = l2_normalise(weights.T @ x)          mixes the raw features, not the normalised ones

Row 0 of the result is the anchor (CLS or EOT), L2-normalised too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-5

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]  # a linear layer: takes tokens, weight and bias

# Limits of the fused kernels.
MAX_WIDTH, MAX_AGGREGATED = 2048, 128


class AtrmInputs(NamedTuple):
    """Tensors of the operation, in the order of its registration; shapes as for :func:`finelip_fast.kernels.atrm`."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    scale: Tensor
    lengths: Tensor | None
    anchor: Tensor


def atrm_reference(inputs: AtrmInputs, *, layer: Layer = F.linear, dtype: torch.dtype = torch.float32) -> Tensor:
    """The operation in plain PyTorch, computed in ``dtype``, with the result in the inputs'; ``layer`` as ``F.linear``."""
    x = inputs.x.to(dtype)
    if inputs.lengths is not None:
        # Before anything else: otherwise a NaN in the padding would come back as zero times NaN.
        x = x.masked_fill(~_valid(inputs.lengths, x), 0.0)
    weights = aggregation_weights(inputs._replace(x=x), layer=layer, dtype=dtype)
    rows = torch.cat([inputs.anchor.to(dtype)[:, None], weights.transpose(1, 2) @ x], dim=1)
    return F.normalize(rows, dim=-1).to(inputs.x.dtype)


def aggregation_weights(inputs: AtrmInputs, *, layer: Layer = F.linear, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights of the tokens in each aggregated token: a distribution over the item's tokens, ``[B, N, K]`` in ``dtype``.

    The anchor is not included.
    """
    x, norm_weight, norm_bias, w1, b1, w2, b2, scale = (tensor.to(dtype) for tensor in inputs[:8])
    hidden = F.gelu(layer(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, LAYER_NORM_EPS), w1, b1))
    logits = layer(hidden, w2, b2) * scale.reshape(())
    if inputs.lengths is not None:
        # Finite, so that an item without tokens gets equal weights over zero rows: its aggregated rows are zero.
        logits = logits.masked_fill(~_valid(inputs.lengths, x), torch.finfo(logits.dtype).min)
    return logits.softmax(dim=1)


def _valid(lengths: Tensor, x: Tensor) -> Tensor:
    """Mask ``[B, N, 1]``, True for valid tokens."""
    return (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
