"""CLIP's two transformers, returning the projected features of every token instead of one vector.

Features have one layout, here and in SigLIP's towers (:mod:`finelip_fast.siglip`): for a picture, the global one first, then
one per patch; for a caption, one per token, with the global one at the end token.

CLIP reads a caption causally, up to its end token, and supports any context length by a stretched table of positions
(:func:`stretch_positions`).
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finelip_fast.config import EOT_TOKEN, KEEP_POSITIONS, FineLIPConfig
from finelip_fast.errors import InputError
from finelip_fast.transformer import Activation, LayerNorm, QuickGELU, Transformer, draw_text_weights

MASKED = -1e4  # added to the attention score of what is not to be seen


class ImageEncoder(nn.Module):
    """Vision transformer: pixels ``[B, 3, H, W]`` to token features ``[B, 1 + P, D]``, CLS first."""

    def __init__(self, config: FineLIPConfig) -> None:
        super().__init__()
        width, patch = config.vision_width, config.patch_size
        sizes = width, config.vision_layers, config.vision_heads, config.vision_mlp_ratio
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(nn.init.normal_(torch.empty(width), std=width**-0.5))
        self.positional_embedding = nn.Parameter(
            nn.init.normal_(torch.empty(config.patches + 1, width), std=width**-0.5)
        )
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(*sizes, activation(config, "vision"))
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(nn.init.normal_(torch.empty(width, config.embed_dim), std=width**-0.5))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)  # [B, P, W]
        cls = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([cls, x], dim=1) + self.positional_embedding.to(x.dtype)
        x = self.ln_post(self.transformer(self.ln_pre(x)))
        features: Tensor = x @ self.proj
        return features


class TextEncoder(nn.Module):
    """Causal text transformer: ids ``[B, T]`` to token features ``[B, T, D]``."""

    attn_mask: Tensor

    def __init__(self, config: FineLIPConfig) -> None:
        super().__init__()
        width = config.text_width
        sizes = width, config.text_layers, config.text_heads, config.text_mlp_ratio
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.transformer = Transformer(*sizes, activation(config, "text"))
        self.ln_final = LayerNorm(width)
        self.register_buffer("attn_mask", self.build_causal_mask(), persistent=False)
        self.text_projection = nn.Parameter(torch.empty(width, config.embed_dim))
        draw_text_weights(self.token_embedding, self.positional_embedding, self.transformer)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def build_causal_mask(self) -> Tensor:
        """Build the mask added to attention scores, ``[S, S]``: no position attends to a later one."""
        # Finite: half precision adds to it without overflow, and the weight of a masked position is 0 all the same.
        positions = len(self.positional_embedding)
        return torch.full((positions, positions), MASKED).triu_(1)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.token_embedding(ids)
        x = x + self.positional_embedding[:length].to(x.dtype)
        x = self.ln_final(self.transformer(x, self.attn_mask[:length, :length]))
        features: Tensor = x @ self.text_projection
        return features


def spread_positions(table: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Spread learned positions evenly over captions of any length.

    A caption's first position gets the table's first row, its last position the last row; those between are interpolated
    linearly. A caption with as many positions as the table has rows gets exactly these.

    Args:
        table: Positions ``[S, W]``.
        lengths: int64 ``[B]``, number of positions of each caption, at least ``S``.
        width: Width ``T``; positions past a caption's last get the last row, too.

    Returns:
        ``[B, T, W]`` in the table's dtype.
    """
    # Computed in integers up to the fraction: half precision cannot distinguish neighbouring positions of a long caption.
    steps = (lengths - 1)[:, None]
    along = torch.arange(width, device=table.device) * (len(table) - 1)
    left = torch.div(along, steps, rounding_mode="floor").clamp(max=len(table) - 2)
    beyond = torch.minimum(along - left * steps, steps)
    fraction = (beyond.to(table.dtype) / steps.to(table.dtype))[..., None]
    start, end = F.embedding(left, table), F.embedding(left + 1, table)
    return torch.lerp(start, end, fraction)


def activation(config: FineLIPConfig, tower: Literal["vision", "text"]) -> Activation:
    """Return the factory of a tower's activations."""
    if config.quick_gelu:
        return QuickGELU
    is_tanh = config.vision_tanh_gelu if tower == "vision" else config.text_tanh_gelu
    return partial(nn.GELU, approximate="tanh") if is_tanh else nn.GELU


def caption_lengths(ids: Tensor, end_token: int = EOT_TOKEN) -> Tensor:
    """Count each caption's tokens, including the end token: ``[B, T]`` to int64 ``[B]``; 0 for a row without an end token."""
    # The minimum of the end tokens' positions, not argmax, whose int64 form is missing or wrong in other runtimes.
    width = ids.shape[1]
    first = torch.where(ids == end_token, torch.arange(width, device=ids.device), width).amin(dim=1)
    return torch.where(first < width, first + 1, 0)


def stretch_positions(table: Tensor, length: int, *, keep: int = KEEP_POSITIONS) -> Tensor:
    """Stretch a table of learned positions to a longer context (Long-CLIP, arXiv 2403.15378; FineLIP, arXiv 2504.01916).

    The first ``keep`` rows stay as they are; the others are interpolated linearly over the rest, and past the last learned
    row extrapolated along the line through the last two. Computed in float64.

    Args:
        table: Positions ``[S, W]``, ``S = 77`` in CLIP.
        length: Number of rows of the result, at least ``S``.
        keep: Number of rows that stay as they are.

    Returns:
        ``[length, W]`` in the table's dtype.

    Raises:
        InputError: The table is too short, or ``length`` is below its number of rows.
    """
    rows = table.shape[0]
    if rows < keep + 2 or length < rows:
        raise InputError(
            f"expected a table of at least {keep + 2} rows and length >= its rows, got {rows} rows and {length}"
        )
    ratio = (rows - keep) / (length - keep)
    target = torch.arange(length, dtype=torch.float64, device=table.device)
    source = torch.where(target < keep, target, keep + (target - keep) * ratio)
    # Clamped so that its right neighbour exists: beyond the last row the fraction exceeds 1, which extrapolates.
    left = source.floor().clamp(max=rows - 2).long()
    exact = table.double()
    return torch.lerp(exact[left], exact[left + 1], (source - left)[:, None]).to(table.dtype)
