"""What to beat: late interaction as research code does it, and as careful plain PyTorch does it.

Shapes as in the library: images ``[B_i, L_i, D]``, captions ``[B_t, L_t, D]``, unit rows, row 0 global; scores ``[B_i, B_t]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def one_caption_at_a_time(
    images: Tensor,
    captions: Iterable[Tensor],
    *,
    aggregate: Callable[[Tensor], Tensor] | None = None,
    alpha: float = 0.8,
) -> Tensor:
    """The research loop: a caption is aggregated, repeated for every image, multiplied, and all of ``S'`` goes through memory.

    Args:
        images: ``[B_i, L_i, D]``.
        captions: Each ``[n, D]``: token features with ``aggregate``, an embedding without.
        aggregate: ``[1, n, D]`` to an embedding ``[1, L_t, D]``.
        alpha: Weight of the global cosine.

    Returns:
        ``[B_i, B_t]`` in the dtype of the images.
    """
    columns = []
    for caption in captions:
        rows = caption[None] if aggregate is None else aggregate(caption[None])
        repeated = rows.repeat(len(images), 1, 1)
        similarity = torch.bmm(repeated, images.transpose(1, 2))  # [B_i, L_t, L_i]
        leaky = F.leaky_relu(similarity, 0.1)
        fine = leaky.max(dim=2).values.mean(dim=1) + leaky.max(dim=1).values.mean(dim=1)
        columns.append(alpha * similarity[:, 0, 0] + (1 - alpha) * fine)
    return torch.stack(columns, dim=1)


def plain_torch(images: Tensor, captions: Tensor, *, alpha: float = 0.8, at_once: int = 32) -> Tensor:
    """One matrix product for ``at_once`` captions and all images, two maxima, leaky ReLU on the maxima alone.

    Returns:
        ``[B_i, B_t]`` in the dtype of the inputs.
    """
    return torch.cat([_plain_block(images, some, alpha) for some in captions.split(at_once)], dim=1)


def _plain_block(images: Tensor, captions: Tensor, alpha: float) -> Tensor:
    similarity = images.flatten(0, 1) @ captions.flatten(0, 1).T
    similarity = similarity.view(*images.shape[:2], *captions.shape[:2])  # [B_i, L_i, b_t, L_t]
    over_captions = F.leaky_relu(similarity.amax(dim=3), 0.1).mean(dim=1)
    over_images = F.leaky_relu(similarity.amax(dim=1), 0.1).mean(dim=2)
    return alpha * similarity[:, 0, :, 0] + (1 - alpha) * (over_captions + over_images)
