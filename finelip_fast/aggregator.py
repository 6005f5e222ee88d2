"""The aggregators' parameters, and joining the windows of a caption."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finelip_fast.kernels import atrm
from finelip_fast.kernels.atrm.formula import AtrmInputs, aggregation_weights


class TokenAggregator(nn.Module):
    """ATRM's parameters for one modality; the operation is :func:`finelip_fast.kernels.atrm`.

    Args:
        embed_dim: Embedding width ``D``.
        hidden: Hidden width ``h``.
        tokens: Number ``K`` of aggregated tokens.
    """

    def __init__(self, embed_dim: int, hidden: int, tokens: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.hidden = nn.Linear(embed_dim, hidden)
        self.logits = nn.Linear(hidden, tokens)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, anchor: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Aggregate token features ``[B, N, D]`` and anchor ``[B, D]`` to the embedding ``[B, K + 1, D]``, unit rows.

        The features are converted to the parameters' dtype first: under autocast the embedding is float32.
        """
        dtype = self.norm.weight.dtype
        return atrm(**self._inputs(x.to(dtype), anchor.to(dtype), lengths)._asdict())

    def weights(self, x: Tensor, anchor: Tensor) -> Tensor:
        """Mixing weights of each aggregated token, for :meth:`forward`'s arguments: distributions, float32 ``[B, K, N]``."""
        return aggregation_weights(self._inputs(x, anchor)).transpose(1, 2)

    def _inputs(self, x: Tensor, anchor: Tensor, lengths: Tensor | None = None) -> AtrmInputs:
        return AtrmInputs(
            x,
            self.norm.weight,
            self.norm.bias,
            self.hidden.weight,
            self.hidden.bias,
            self.logits.weight,
            self.logits.bias,
            self.scale,
            lengths,
            anchor,
        )


def global_rows(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Embeddings ``[B, 1, D]`` of global features ``[B, D]`` alone: row 0 of what :class:`TokenAggregator` returns.

    Args:
        features: Features of CLS or of the end token; zeros stay zeros.
        dtype: Dtype of the parameters and of the embeddings.
    """
    return F.normalize(features.to(dtype).float(), dim=-1).to(dtype)[:, None]


def join_windows(embeddings: Tensor, owner: Tensor) -> Tensor:
    """Join the windows of long captions into one embedding per caption.

    Row ``r`` of every window comes from the same aggregated token (row 0: the end token), so the windows are averaged row by
    row and renormalised to unit length. A caption of one window keeps its embedding bit for bit.

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
