"""The transformer of CLIP's and SigLIP's towers: blocks of attention and an MLP, each after a norm.

Parameters carry CLIP's own names and get the initial values that open_clip gives them, in the same order of random draws.
open_clip's classes would do, but importing open_clip takes two seconds, which every command would wait for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Activation = Callable[[], nn.Module]


class LayerNorm(nn.LayerNorm):
    """A layer norm that returns its input's dtype, even where autocast computes it in float32."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(input.dtype)


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, the approximation of GELU that OpenAI trained CLIP with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualBlock(nn.Module):
    """One layer: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: Activation, epsilon: float) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.ln_1 = LayerNorm(width, eps=epsilon)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = LayerNorm(width, eps=epsilon)
        layers = OrderedDict(c_fc=nn.Linear(width, hidden), gelu=activation(), c_proj=nn.Linear(hidden, width))
        self.mlp = nn.Sequential(layers)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        normed = self.ln_1(x)
        attn_mask = None if attn_mask is None else attn_mask.to(normed.dtype)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=attn_mask)[0]
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    """A stack of residual blocks.

    Args:
        width, layers, heads: Sizes.
        mlp_ratio: Width of the MLPs as a multiple of ``width``.
        activation: Factory of the MLPs' activations.
        epsilon: Number that the norms add to variances.

    Attributes:
        grad_checkpointing: Whether to recompute activations in the backward pass instead of keeping them.
    """

    def __init__(
        self, width: int, layers: int, heads: int, mlp_ratio: float, activation: Activation, epsilon: float = 1e-5
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(
            ResidualBlock(width, heads, mlp_ratio, activation, epsilon) for _ in range(layers)
        )

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Transform ``x [B, T, W]``; ``attn_mask``, ``[T, T]`` or ``[B heads, T, T]``, is added to the attention scores."""
        for block in self.resblocks:
            x = checkpoint(block, x, attn_mask, use_reentrant=False) if self.grad_checkpointing else block(x, attn_mask)
        return x


def draw_text_weights(embedding: nn.Embedding, positions: nn.Parameter, transformer: Transformer) -> None:
    """Draw the initial weights of a text tower, as CLIP was trained from (arXiv 2103.00020); norms and biases stay."""
    width, depth = positions.shape[1], len(transformer.resblocks)
    nn.init.normal_(embedding.weight, std=0.02)
    nn.init.normal_(positions, std=0.01)
    block: Any
    for block in transformer.resblocks:
        nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
