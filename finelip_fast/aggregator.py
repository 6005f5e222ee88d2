"""The aggregators' parameters, and the join of a caption's windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finelip_fast.kernels import atrm
from finelip_fast.kernels.atrm.formula import AtrmInputs, aggregation_weights


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
        return atrm(**self._inputs(x.to(dtype), anchor.to(dtype), lengths)._asdict())

    def weights(self, x: Tensor, anchor: Tensor) -> Tensor:
        """What each aggregated token is mixed of, for :meth:`forward`'s arguments: distributions, float32 ``[B, K, N]``."""
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
    """The embeddings ``[B, 1, D]`` of global features ``[B, D]`` alone: the row 0 that :class:`TokenAggregator` gives.

    Args:
        features: Features of CLS or of the end token; zeros stay zeros.
        dtype: The parameters' dtype, which the embeddings have too.
    """
    return F.normalize(features.to(dtype).float(), dim=-1).to(dtype)[:, None]


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
