"""CLIP's two transformers and SigLIP's, returning the projected features of every token instead of one vector.

The towers are open_clip's, whose parameters carry CLIP's own names. All return features in one layout: for a picture, the
global one first, then one per patch; for a caption, one per token, with the global one at the end token.

CLIP reads a caption causally, up to its end token, and supports any context length by a stretched table of positions
(:func:`stretch_positions`). SigLIP (arXiv 2303.15343, 2502.14786) was trained on captions padded to 64 positions, attends to
all of them from each, and is read at the last. So up to 64 tokens are read in exactly this way here, whatever the context
length. A longer caption has no padding; its positions are spread evenly over the trained table, whose last row stays with the
position that is read. Every row has been trained, so none has to be kept or added.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import LayerNorm, QuickGELU, TextTransformer, Transformer, VisionTransformer
from timm.layers.attention_pool import AttentionPoolLatent
from torch import Tensor, nn

from finelip_fast.config import EOT_TOKEN, KEEP_POSITIONS, SIGLIP_EPSILON, FineLIPConfig
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
            act_layer=_activation(config, "vision"),
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
            act_layer=_activation(config, "text"),
        )

    def build_causal_mask(self) -> Tensor:
        """Build the mask added to attention scores, ``[S, S]``: no position attends to a later one."""
        # Finite, unlike open_clip's -inf: half precision adds to it without overflow, and its weight is 0 all the same.
        return torch.full((self.num_pos, self.num_pos), _MASKED).triu_(1)

    def forward(self, ids: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        length = ids.shape[1]
        x = self.token_embedding(ids)
        x = x + self.positional_embedding[:length].to(x.dtype)
        x = self.ln_final(self.transformer(x, attn_mask=self.attn_mask[:length, :length]))
        features: Tensor = x @ self.text_projection
        return features


class AttentionPool(AttentionPoolLatent):
    """Attention of a learned query over the patches, and the layers that turn its result into a feature.

    A picture's feature is ``head(sum of weight_p * value_p)``. Just as CLIP's projection is applied to every token, this head
    is applied to every patch: ``head(value_p)`` is what the pool would return if it attended to that patch alone.
    """

    mlp: Any

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        """Map normalised patches ``[B, P, W]`` to features ``[B, 1 + P, W]``, the picture's first."""
        key, value = self.kv(x).chunk(2, dim=-1)
        query = self.q(self.latent.to(x.dtype).expand(x.shape[0], -1, -1))
        heads = [rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for rows in (query, key, value)]
        gathered = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)  # [B, 1, W]
        rows = self.proj(torch.cat([gathered, value], dim=1))
        features: Tensor = rows + self.mlp(self.norm(rows))
        return features


class SigLIPImageEncoder(nn.Module):
    """Vision transformer without a class token: pixels ``[B, 3, H, W]`` to features ``[B, 1 + P, D]``, pooled one first."""

    def __init__(self, config: FineLIPConfig) -> None:
        super().__init__()
        width, patch = config.vision_width, config.patch_size
        layers: dict[str, Any] = {
            "norm_layer": _norm(),
            "act_layer": _activation(config, "vision"),
        }
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(config.patches, width))
        self.transformer = Transformer(
            width, config.vision_layers, config.vision_heads, config.vision_mlp_ratio, **layers
        )
        self.ln_post = layers["norm_layer"](width)
        self.attn_pool = AttentionPool(
            width, num_heads=config.vision_heads, mlp_ratio=config.vision_mlp_ratio, **layers
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.transformer.grad_checkpointing = enable

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)  # [B, P, W]
        x = self.ln_post(self.transformer(x + self.positional_embedding.to(x.dtype)))
        features: Tensor = self.attn_pool(x)
        return features


class SigLIPTextEncoder(TextTransformer):  # type: ignore[misc]  # open_clip is untyped
    """Text transformer with full attention: ids ``[B, T]`` to features ``[B, T, D]``, the global one at the end token.

    Neither ids after a caption's end token nor the width of the batch affect the result.
    """

    text_projection: nn.Linear

    def __init__(self, config: FineLIPConfig) -> None:
        super().__init__(
            context_length=config.text_positions,
            vocab_size=config.vocab_size,
            width=config.text_width,
            heads=config.text_heads,
            layers=config.text_layers,
            mlp_ratio=config.text_mlp_ratio,
            output_dim=config.embed_dim,
            no_causal_mask=True,
            pad_id=config.pad_token,
            pool_type="last",
            proj_bias=True,
            norm_layer=_norm(),
            act_layer=_activation(config, "text"),
        )
        self.end_token = config.end_token

    def forward(self, ids: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        width, rows = ids.shape[1], self.num_pos
        lengths = caption_lengths(ids, self.end_token)
        missing: Any = torch.sym_max(width, rows) - width  # no branch: an exported graph takes any width
        ids = F.pad(ids, (0, missing))
        position = torch.arange(ids.shape[1], device=ids.device)
        x = self.token_embedding(ids.masked_fill(position >= lengths[:, None], self.pad_id))
        visible = lengths.clamp(min=rows)  # [B], number of positions of each caption
        if ids.shape[1] == rows and not torch.compiler.is_compiling():
            x = self.transformer(x + self.positional_embedding.to(x.dtype))
        else:
            x = x + spread_positions(self.positional_embedding, visible, ids.shape[1]).to(x.dtype)
            hidden = torch.zeros(ids.shape, dtype=x.dtype, device=x.device)
            hidden = hidden.masked_fill(position >= visible[:, None], _MASKED)
            # [B heads, T, T], with the same row for every position
            mask = hidden.repeat_interleave(self.heads, 0)[:, None].expand(-1, ids.shape[1], -1)
            x = self.transformer(x, attn_mask=mask)
        last = x[torch.arange(x.shape[0], device=x.device), visible - 1]
        x = torch.where((position == lengths[:, None] - 1)[..., None], last[:, None], x)
        features: Tensor = self.text_projection(self.ln_final(x[:, :width]))
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


def image_encoder(config: FineLIPConfig) -> ImageEncoder | SigLIPImageEncoder:
    """Create the picture encoder of a model's family."""
    return SigLIPImageEncoder(config) if config.family == "siglip" else ImageEncoder(config)


def text_encoder(config: FineLIPConfig) -> TextEncoder | SigLIPTextEncoder:
    """Create the caption encoder of a model's family."""
    return SigLIPTextEncoder(config) if config.family == "siglip" else TextEncoder(config)


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


def _norm() -> Any:
    """Factory of SigLIP's norms; open_clip asks for a class, but accepts any function."""
    return partial(LayerNorm, eps=SIGLIP_EPSILON)


def _activation(config: FineLIPConfig, tower: str) -> Any:
    """Factory of activations; open_clip asks for a class, but accepts any function."""
    if config.quick_gelu:
        return QuickGELU
    return partial(nn.GELU, approximate="tanh") if getattr(config, f"{tower}_tanh_gelu") else nn.GELU
