"""Ranks in both directions from tiles of scores: the whole matrix of scores is never in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from finelip_fast.errors import InputError
from finelip_fast.kernels import clim_scores

# A pair's own score and its tile come from calls of different shapes, which may add the products in another order: scores of
# equal embeddings then differ by some units in the last place of float32, 1.2e-7 near 1. Ties must count against the right
# item even then, so a wrong item whose score is within this distance of the right one's counts as a tie.
TOLERANCE = 1e-6

_OWN = 32  # captions whose own scores are computed at once: only one in this many scores of the tile is needed


class Rows(Protocol):
    """Embeddings ``[N, L, D]`` that are indexed by slices or int64 row numbers, such as a tensor."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice | Tensor, /) -> Tensor: ...


def tiled_ranks(
    images: Rows,
    texts: Rows,
    picture_of: Tensor,
    alphas: Sequence[float],
    *,
    device: torch.device | None = None,
    tile: int = 1024,
    progress: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """Compute :func:`finelip_fast.metrics.pair_ranks` of the matrix of scores, for several weights in one pass.

    The two parts of the score, the global cosine and ``fine``, are computed once per tile; the scores for each weight are
    ``alpha * global + (1 - alpha) * fine``. A wrong item within :data:`TOLERANCE` of the right one counts as a tie, and ties
    count against the right one; right items of one picture do not count against each other.

    Args:
        images: Embeddings of ``P`` pictures.
        texts: Embeddings of ``C`` captions.
        picture_of: int64 ``[C]``, the number of the picture that each caption describes; each picture has a caption.
        alphas: Weights of the global cosine.
        device: Device to score on; None: that of the embeddings.
        tile: Number of pictures and of captions in a tile.
        progress: Whether to show a progress bar.

    Returns:
        For each weight ``i2t`` int64 ``[P]`` and ``t2i`` int64 ``[C]``, on the CPU. Memory used besides the embeddings: two
        blocks of them, ``tile * tile`` scores and a few numbers for each item and weight.

    Raises:
        InputError: There is nothing to rank, ``picture_of`` has another shape, or a picture has no caption.
    """
    pictures, captions = len(images), len(texts)
    if not pictures or picture_of.shape != (captions,) or not torch.equal(picture_of.unique(), torch.arange(pictures)):
        raise InputError(
            f"expected picture_of [{captions}] with each of the {pictures} pictures, got {list(picture_of.shape)} with "
            f"{len(picture_of.unique())} pictures"
        )
    own_global, own_fine = _own_scores(images, texts, picture_of, device)
    device, owners = own_global.device, picture_of.to(own_global.device)
    to_beat, counts = [], []
    for alpha in alphas:
        # A right item that is NaN ranks behind all wrong ones.
        right_score = _combined(own_global, own_fine, alpha).nan_to_num(nan=-torch.inf)
        best = torch.full((pictures,), -torch.inf, device=device).scatter_reduce(0, owners, right_score, "amax")
        to_beat.append((best - TOLERANCE, right_score - TOLERANCE))
        counts.append((torch.ones(pictures, dtype=torch.int64, device=device), torch.ones_like(owners)))
    tiles = -(-pictures // tile) * -(-captions // tile)
    with tqdm(total=tiles, unit="tile", desc="ranks", disable=not progress, mininterval=0.5) as bar, torch.no_grad():
        for top in range(0, pictures, tile):
            some_images = images[top : top + tile].to(device)
            rows = slice(top, top + len(some_images))
            numbers = torch.arange(rows.start, rows.stop, device=device)[:, None]
            for left in range(0, captions, tile):
                columns = slice(left, min(left + tile, captions))
                global_scores, fine = _both_scores(some_images, texts[columns].to(device))
                wrong = owners[columns] != numbers
                for alpha, (best, right_score), (i2t, t2i) in zip(alphas, to_beat, counts, strict=True):
                    scores = _combined(global_scores, fine, alpha)
                    # Written so that NaN counts against the right item, too.
                    i2t[rows] += (wrong & ~(scores < best[rows, None])).sum(dim=1)
                    t2i[columns] += (wrong & ~(scores < right_score[columns])).sum(dim=0)
                bar.update()
    return [(i2t.cpu(), t2i.cpu()) for i2t, t2i in counts]


def _own_scores(images: Rows, texts: Rows, picture_of: Tensor, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """The global cosine and ``fine`` of each caption with its own picture, ``[C]`` each."""
    pieces = []
    for owners, first in zip(picture_of.split(_OWN), range(0, len(picture_of), _OWN), strict=True):
        numbers, row_of = owners.unique(return_inverse=True)
        some_texts = texts[first : first + len(owners)]
        pair_scores = _both_scores(
            images[numbers].to(device or some_texts.device), some_texts.to(device or some_texts.device)
        )
        column = torch.arange(len(owners))
        pieces.append([scores[row_of.to(scores.device), column.to(scores.device)] for scores in pair_scores])
    own_global, own_fine = zip(*pieces, strict=True)
    return torch.cat(own_global), torch.cat(own_fine)


@torch.no_grad()
def _both_scores(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    # With only the first rows, there is nothing but the cosine to compute.
    return clim_scores(images[:, :1], texts[:, :1], alpha=1.0), clim_scores(images, texts, alpha=0.0)


def _combined(global_scores: Tensor, fine: Tensor, alpha: float) -> Tensor:
    return alpha * global_scores + (1 - alpha) * fine
