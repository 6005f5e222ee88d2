"""The aggregators' parameters, and the join of a caption's windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finelip_fast.kernels import atrm


class TokenAggregator(nn.Module):
    """ATRM's parameters for one modality; the operation is :func:`finelip_fast.kernels.atrm`.

    Args:
        embed_dim: ``D``.
        hidden: ``h``.
        tokens: ``K``, aggregated tokens.
    """

    def __init__(self, embed_dim: int, hidden: int, tokens: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.hidden = nn.Linear(embed_dim, hidden)
        self.logits = nn.Linear(hidden, tokens)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, anchor: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Token features ``[B, N, D]`` and anchor ``[B, D]`` to the embedding ``[B, K + 1, D]``, unit rows.

        The features are taken to the parameters' dtype first: under autocast the embedding is float32.
        """
        dtype = self.norm.weight.dtype
        return atrm(
            x.to(dtype),
            self.norm.weight,
            self.norm.bias,
            self.hidden.weight,
            self.hidden.bias,
            self.logits.weight,
            self.logits.bias,
            self.scale,
            lengths=lengths,
            anchor=anchor.to(dtype),
        )

    def weights(self, x: Tensor) -> Tensor:
        """What each aggregated token is mixed of: features ``[N, D]`` to distributions over them, float32 ``[K, N]``."""
        parameters = {name: value.float() for name, value in self.named_parameters()}
        normalised = F.layer_norm(
            x.float(), x.shape[-1:], parameters["norm.weight"], parameters["norm.bias"], self.norm.eps
        )
        hidden = F.gelu(F.linear(normalised, parameters["hidden.weight"], parameters["hidden.bias"]))
        logits = F.linear(hidden, parameters["logits.weight"], parameters["logits.bias"]) * parameters["scale"]
        return logits.T.softmax(dim=1)


def join_windows(embeddings: Tensor, owner: Tensor) -> Tensor:
    """Join the windows of long captions into one embedding per caption.

    Row ``r`` of every window was made by the same aggregated token (row 0: the end token), so the rows of the windows are
    averaged one by one and brought back to unit length. A caption of one window keeps its embedding bit for bit.

    Args:
        embeddings: ``[W, L, D]``, one per window.
        owner: int64 ``[W]``, ascending from 0 without gaps: the caption of each window.

    Returns:
        ``[B, L, D]``.
    """
    counts = torch.bincount(owner)
    if bool((counts == 1).all()):
        return embeddings
    total = embeddings.new_zeros(len(counts), *embeddings.shape[1:], dtype=torch.float32)
    total.index_add_(0, owner, embeddings.float())
    joined = F.normalize(total, dim=-1).to(embeddings.dtype)
    single = (counts == 1)[owner]
    joined[owner[single]] = embeddings[single]
    return joined
