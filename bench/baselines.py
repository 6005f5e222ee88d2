"""Baselines: late interaction as research code does it, and as careful plain PyTorch does it.

Shapes are those of the library: images ``[B_i, L_i, D]``, captions ``[B_t, L_t, D]``, unit rows, row 0 global; scores
``[B_i, B_t]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finelip_fast.kernels.floor import seconds
from finelip_fast.model import FineLIP

# Numbers of similarities that tuned plain PyTorch tries to hold at once, from within the L2 cache to far beyond it.
_ELEMENTS_AT_ONCE = (1 << 22, 1 << 24, 1 << 26, 1 << 28)


def one_caption_at_a_time(
    images: Tensor,
    captions: Iterable[Tensor],
    *,
    aggregate: Callable[[Tensor], Tensor] | None = None,
    alpha: float = 0.8,
) -> Tensor:
    """The research loop: each caption is aggregated, repeated per image and multiplied, and all of ``S'`` goes through memory.

    Args:
        images: Embeddings ``[B_i, L_i, D]``.
        captions: Tensors ``[n, D]``: token features if ``aggregate`` is given, otherwise an embedding.
        aggregate: Function from ``[1, n, D]`` to an embedding ``[1, L_t, D]``.
        alpha: Weight of the global cosine.

    Returns:
        Scores ``[B_i, B_t]`` in the dtype of the images.
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


def plain_block(images: Tensor, captions: Tensor, alpha: float) -> Tensor:
    """All scores ``[B_i, B_t]`` by one matrix product and two maxima, with leaky ReLU applied only to the maxima."""
    similarity = images.flatten(0, 1) @ captions.flatten(0, 1).T
    similarity = similarity.view(*images.shape[:2], *captions.shape[:2])  # [B_i, L_i, b_t, L_t]
    over_captions = F.leaky_relu(similarity.amax(dim=3), 0.1).mean(dim=1)
    over_images = F.leaky_relu(similarity.amax(dim=1), 0.1).mean(dim=2)
    return alpha * similarity[:, 0, :, 0] + (1 - alpha) * (over_captions + over_images)


def plain_torch(
    images: Tensor,
    captions: Tensor,
    *,
    alpha: float = 0.8,
    at_once: int = 32,
    images_at_once: int | None = None,
    block: Callable[[Tensor, Tensor, float], Tensor] = plain_block,
) -> Tensor:
    """Apply ``block`` to ``at_once`` captions and ``images_at_once`` images (None: all) at a time.

    Returns:
        Scores ``[B_i, B_t]`` in the dtype of the inputs.
    """
    rows = [
        torch.cat([block(some_images, some_captions, alpha) for some_captions in captions.split(at_once)], dim=1)
        for some_images in images.split(images_at_once or max(1, len(images)))
    ]
    return torch.cat(rows)


checkpointed_block: Callable[[Tensor, Tensor, float], Tensor] = partial(checkpoint, plain_block, use_reentrant=False)
"""The block, computed again for its gradient instead of kept."""


def compiled_block(mode: str | None = None) -> Any:
    """Compile the block with ``torch.compile``, resetting it first: after a few shapes, it would silently stop compiling."""
    torch.compiler.reset()
    return torch.compile(plain_block, dynamic=False, mode=mode)


def images_that_suit(images: Tensor, captions: Tensor) -> int:
    """The fastest number of images at once on this machine, with all captions at a time, measured before the contest."""
    per_image = max(1, images.shape[1] * captions.shape[0] * captions.shape[1])
    sizes = {min(len(images), max(1, elements // per_image)) for elements in _ELEMENTS_AT_ONCE}
    runs = {size: partial(plain_torch, images, captions, at_once=len(captions), images_at_once=size) for size in sizes}
    return min(runs, key=lambda size: seconds(runs[size], rounds=3))


def exact_scores(images: Tensor, captions: Tensor, *, alpha: float = 0.8) -> Tensor:
    """``[B_i, B_t]`` in float64, a few at a time."""
    rows = [plain_torch(block.double(), captions.double(), alpha=alpha, at_once=4) for block in images.split(1_000)]
    return torch.cat(rows)


def in_open_clip(model: FineLIP) -> Any:
    """open_clip's own model with the weights of ``model``: its towers use the same names."""
    import open_clip

    config = model.config
    vision = {
        "image_size": config.image_size,
        "layers": config.vision_layers,
        "width": config.vision_width,
        "patch_size": config.patch_size,
    }
    text = {
        "context_length": config.context_length,
        "vocab_size": config.vocab_size,
        "width": config.text_width,
        "heads": config.text_heads,
        "layers": config.text_layers,
    }
    reference = open_clip.model.CLIP(config.embed_dim, vision, text, quick_gelu=config.quick_gelu).eval()
    state = model.state_dict()
    weights = {name: value for name, value in state.items() if name.startswith("visual.")}
    weights |= {name.removeprefix("text."): value for name, value in state.items() if name.startswith("text.")}
    reference.load_state_dict(weights | {"logit_scale": state["logit_scale"]})
    return reference
