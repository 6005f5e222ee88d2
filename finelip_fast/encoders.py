"""CLIP's two transformers, returning the projected features of every token instead of one vector.

The towers are open_clip's, whose parameters carry CLIP's own names. The text tower takes any context length: its table of
positions is a stretched one (:func:`stretch_positions`).
"""

from __future__ import annotations

import torch
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer
from torch import Tensor, nn

from finelip_fast.config import EOT_TOKEN, KEEP_POSITIONS, FineLIPConfig
from finelip_fast.errors import InputError

_MASKED = -1e4


class ImageEncoder(VisionTransformer):  # type: ignore[misc]  # open_clip is untyped
    """Vision transformer: pixels ``[B, 3, H, W]`` to token features ``[B, 1 + P, D]``, CLS first."""

    def __init__(self, config: FineLIPConfig) -> None:
        super().__init__(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.vision_width,
            layers=config.vision_layers,
            heads=config.vision_heads,
            mlp_ratio=config.vision_mlp_ratio,
            output_dim=config.embed_dim,
            act_layer=_activation(config),
        )

    def forward(self, pixels: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = self.conv1(pixels).flatten(2).transpose(1, 2)  # [B, P, W]
        cls = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([cls, x], dim=1) + self.positional_embedding.to(x.dtype)
        x = self.ln_post(self.transformer(self.ln_pre(x)))
        features: Tensor = x @ self.proj
        return features


class TextEncoder(TextTransformer):  # type: ignore[misc]  # open_clip is untyped
    """Causal text transformer: ids ``[B, T]`` to token features ``[B, T, D]``."""

    attn_mask: Tensor

    def __init__(self, config: FineLIPConfig) -> None:
        super().__init__(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.text_width,
            heads=config.text_heads,
            layers=config.text_layers,
            mlp_ratio=config.text_mlp_ratio,
            output_dim=config.embed_dim,
            act_layer=_activation(config),
        )

    def build_causal_mask(self) -> Tensor:
        """Added to the scores of attention, ``[S, S]``: no position sees a later one."""
        # Finite, where open_clip has -inf: half precision adds to it without overflow, and its weight is 0 all the same.
        return torch.full((self.num_pos, self.num_pos), _MASKED).triu_(1)

    def forward(self, ids: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        length = ids.shape[1]
        x = self.token_embedding(ids)
        x = x + self.positional_embedding[:length].to(x.dtype)
        x = self.ln_final(self.transformer(x, attn_mask=self.attn_mask[:length, :length]))
        features: Tensor = x @ self.text_projection
        return features


def caption_lengths(ids: Tensor) -> Tensor:
    """Real tokens of each caption, start to end token: ``[B, T]`` to int64 ``[B]``; 0 for a row without an end token."""
    # The lowest position of an end token, not argmax: its int64 form is missing or wrong in other runtimes.
    width = ids.shape[1]
    first = torch.where(ids == EOT_TOKEN, torch.arange(width, device=ids.device), width).amin(dim=1)
    return torch.where(first < width, first + 1, 0)


def stretch_positions(table: Tensor, length: int, *, keep: int = KEEP_POSITIONS) -> Tensor:
    """Stretch a table of learned positions to a longer context (Long-CLIP, arXiv 2403.15378; FineLIP, arXiv 2504.01916).

    The first ``keep`` rows stay as they are; the others are interpolated linearly over the rest, and past the last learned
    row the line through the last two goes on. Computed in float64.

    Args:
        table: Positions ``[S, W]``, ``S = 77`` in CLIP.
        length: Rows wanted, at least ``S``.
        keep: Rows that stay as they are.

    Returns:
        ``[length, W]`` in the table's dtype.

    Raises:
        InputError: A table too short, or ``length`` below its rows.
    """
    rows = table.shape[0]
    if rows < keep + 2 or length < rows:
        raise InputError(
            f"expected a table of at least {keep + 2} rows and length >= its rows, got {rows} rows and {length}"
        )
    ratio = (rows - keep) / (length - keep)
    target = torch.arange(length, dtype=torch.float64, device=table.device)
    source = torch.where(target < keep, target, keep + (target - keep) * ratio)
    # Clamped so that its right neighbour exists: the fraction then passes 1 beyond the last row, which extrapolates.
    left = source.floor().clamp(max=rows - 2).long()
    exact = table.double()
    return torch.lerp(exact[left], exact[left + 1], (source - left)[:, None]).to(table.dtype)


def _activation(config: FineLIPConfig) -> type[nn.Module]:
    return QuickGELU if config.quick_gelu else nn.GELU
