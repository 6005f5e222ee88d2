"""SigLIP's two transformers, returning the projected features of every token like CLIP's (:mod:`finelip_fast.encoders`).

SigLIP (arXiv 2303.15343, 2502.14786) was trained on captions padded to 64 positions, attends to all of them from each, and is
read at the last. So up to 64 tokens are read in exactly this way here, whatever the context length. A longer caption has no
padding; its positions are spread evenly over the trained table, whose last row stays with the position that is read. Every
row has been trained, so none has to be kept or added.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers.attention_pool import AttentionPoolLatent
from torch import Tensor, nn

from finelip_fast.config import SIGLIP_EPSILON, FineLIPConfig
from finelip_fast.encoders import MASKED, activation, caption_lengths, spread_positions
from finelip_fast.transformer import LayerNorm, Transformer, draw_text_weights


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
        sizes = width, config.vision_layers, config.vision_heads, config.vision_mlp_ratio
        gelu = activation(config, "vision")
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch)
        self.positional_embedding = nn.Parameter(nn.init.normal_(torch.empty(config.patches, width), std=width**-0.5))
        self.transformer = Transformer(*sizes, gelu, SIGLIP_EPSILON)
        self.ln_post = LayerNorm(width, eps=SIGLIP_EPSILON)
        self.attn_pool = AttentionPool(
            width,
            num_heads=config.vision_heads,
            mlp_ratio=config.vision_mlp_ratio,
            norm_layer=cast("type[nn.Module]", partial(LayerNorm, eps=SIGLIP_EPSILON)),  # timm accepts any function
            act_layer=cast("type[nn.Module]", gelu),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)  # [B, P, W]
        x = self.ln_post(self.transformer(x + self.positional_embedding.to(x.dtype)))
        features: Tensor = self.attn_pool(x)
        return features


class SigLIPTextEncoder(nn.Module):
    """Text transformer with full attention: ids ``[B, T]`` to features ``[B, T, D]``, the global one at the end token.

    Neither ids after a caption's end token nor the width of the batch affect the result.
    """

    def __init__(self, config: FineLIPConfig) -> None:
        super().__init__()
        width = config.text_width
        sizes = width, config.text_layers, config.text_heads, config.text_mlp_ratio
        self.heads, self.pad_token, self.end_token = config.text_heads, config.pad_token, config.end_token
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.text_positions, width))
        self.transformer = Transformer(*sizes, activation(config, "text"), SIGLIP_EPSILON)
        self.ln_final = LayerNorm(width, eps=SIGLIP_EPSILON)
        self.text_projection = nn.Linear(width, config.embed_dim)
        draw_text_weights(self.token_embedding, self.positional_embedding, self.transformer)
        nn.init.normal_(self.text_projection.weight, std=width**-0.5)
        nn.init.zeros_(self.text_projection.bias)

    def forward(self, ids: Tensor) -> Tensor:
        width, rows = ids.shape[1], len(self.positional_embedding)
        lengths = caption_lengths(ids, self.end_token)
        missing: Any = torch.sym_max(width, rows) - width  # no branch: an exported graph takes any width
        ids = F.pad(ids, (0, missing))
        position = torch.arange(ids.shape[1], device=ids.device)
        x = self.token_embedding(ids.masked_fill(position >= lengths[:, None], self.pad_token))
        visible = lengths.clamp(min=rows)  # [B], number of positions of each caption
        if ids.shape[1] == rows and not torch.compiler.is_compiling():
            x = self.transformer(x + self.positional_embedding.to(x.dtype))
        else:
            x = x + spread_positions(self.positional_embedding, visible, ids.shape[1]).to(x.dtype)
            hidden = torch.zeros(ids.shape, dtype=x.dtype, device=x.device)
            hidden = hidden.masked_fill(position >= visible[:, None], MASKED)
            # [B heads, T, T], with the same row for every position
            mask = hidden.repeat_interleave(self.heads, 0)[:, None].expand(-1, ids.shape[1], -1)
            x = self.transformer(x, mask)
        last = x[torch.arange(x.shape[0], device=x.device), visible - 1]
        x = torch.where((position == lengths[:, None] - 1)[..., None], last[:, None], x)
        features: Tensor = self.text_projection(self.ln_final(x[:, :width]))
        return features
