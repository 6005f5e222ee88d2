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

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-5

# What the fused kernels take.
MAX_WIDTH, MAX_AGGREGATED = 2048, 128


def atrm_reference(
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
    *,
    layer: Callable[[Tensor, Tensor, Tensor], Tensor] = F.linear,
) -> Tensor:
    """The operation in plain PyTorch, in float32 whatever the inputs; shapes as :func:`atrm`, ``layer`` as ``F.linear``."""
    dtype = x.dtype
    x, norm_weight, norm_bias, w1, b1, w2, b2, scale, anchor = (
        t.float() for t in (x, norm_weight, norm_bias, w1, b1, w2, b2, scale, anchor)
    )
    valid = None
    if lengths is not None:
        valid = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
        # Before anything else: a NaN in the padding would come back as zero times NaN.
        x = x.masked_fill(~valid, 0.0)
    hidden = F.gelu(layer(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, LAYER_NORM_EPS), w1, b1))
    logits = layer(hidden, w2, b2) * scale.reshape(())
    if valid is not None:
        # Finite, so that an item without a token gets even weights over zero rows: its aggregated rows are zero.
        logits = logits.masked_fill(~valid, torch.finfo(logits.dtype).min)
    rows = torch.cat([anchor[:, None], logits.softmax(dim=1).transpose(1, 2) @ x], dim=1)
    return F.normalize(rows, dim=-1).to(dtype)
