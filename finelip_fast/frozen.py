"""The encoders as they run on a CPU: weights laid out once, captions without padding, nothing kept for a gradient.

A block of CLIP's transformers is seven operations here: two norms, four linear layers and attention. The activation of the MLP
is a part of its first layer, and attention reads queries, keys and values where the one projection wrote them. Rows of all
captions lie one after another, so that each takes what its own tokens take; only attention looks at them one length at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from finelip_fast.encoders import ImageEncoder, TextEncoder, caption_lengths
from finelip_fast.kernels import cpu
from finelip_fast.kernels.cpu import LinearPrecision, filled_rows, frozen_linear
from finelip_fast.model import FineLIP

# QuickGELU is x * sigmoid(1.702 x), which is swish(1.702 x) / 1.702, and swish is what oneDNN has.
_QUICK = 1.702

# Rows of a transformer's blocks that are computed together: the widest of their activations stay in the cache.
_ROWS = 1600


class Run(NamedTuple):
    """Items of one length, whose rows lie one after another."""

    items: int
    length: int

    @property
    def rows(self) -> int:
        return self.items * self.length


def freeze(model: FineLIP, precision: LinearPrecision = "fp32") -> FineLIP:
    """Replace a model's encoders by frozen ones, which are all that then holds their weights.

    Args:
        model: A model in float32 on the CPU, in eval mode; changed in place, and good for :meth:`FineLIP.encode_image` and
            :meth:`FineLIP.encode_text` from here on.
        precision: Precision of the blocks' linear layers; ``"bf16"`` also of attention. Everything else is float32.

    Returns:
        The model.
    """
    model.add_module("visual", FrozenImageEncoder(model.visual, precision))
    model.add_module("text", FrozenTextEncoder(model.text, precision))
    return model


def why_not(precision: str) -> str | None:
    """Why a processor gains nothing by a precision; None if it has the instructions."""
    if precision == "bf16" and not cpu.has_bfloat16():
        return "this processor has no bfloat16 instructions"
    if precision == "int8" and not cpu.has("vnni"):
        return "this processor has no int8 instructions (AVX-512 VNNI)"
    return None


class FrozenImageEncoder(nn.Module):
    """:class:`finelip_fast.encoders.ImageEncoder` without its parameters: pixels ``[B, 3, H, W]`` to ``[B, 1 + P, D]``."""

    def __init__(self, encoder: ImageEncoder, precision: LinearPrecision = "fp32") -> None:
        super().__init__()
        positions = encoder.positional_embedding.detach()
        self._cls, self._positions = encoder.class_embedding.detach() + positions[0], positions[1:]
        self._patch = encoder.conv1.kernel_size[0]
        self._embed = frozen_linear(encoder.conv1.weight.flatten(1), None)
        self._norm = _norm(encoder.ln_pre)
        self._blocks = [_Block(block, precision) for block in encoder.transformer.resblocks]
        self._head = _Head(encoder.ln_post, encoder.proj)

    def forward(self, pixels: Tensor) -> Tensor:
        length = 1 + len(self._positions)
        features = pixels.new_empty(len(pixels), length, self._head.width)
        at_once = max(1, _ROWS // length)
        for first in range(0, len(pixels), at_once):
            batch = slice(first, first + at_once)
            features[batch] = self._encode(pixels[batch]).view(-1, length, self._head.width)
        return features

    def _encode(self, pixels: Tensor) -> Tensor:
        """Pixels ``[B, 3, H, W]`` to features ``[B (1 + P), D]``."""
        # [B, 3, H, W] -> [B, 3, rows, p, columns, p] -> [B, rows, columns, 3, p, p]: a patch is a row of the product.
        patches = pixels.unflatten(3, (-1, self._patch)).unflatten(2, (-1, self._patch)).permute(0, 2, 4, 1, 3, 5)
        embedded = self._embed(patches.flatten(3).flatten(0, 2)).view(len(pixels), *self._positions.shape)
        x = torch.cat([self._cls.expand(len(pixels), 1, -1), embedded.add_(self._positions)], dim=1)
        run = Run(*x.shape[:2])
        x = self._norm(x.flatten(0, 1))
        for block in self._blocks:
            block(x, [run], causal=False)
        return self._head(x)


class FrozenTextEncoder(nn.Module):
    """:class:`finelip_fast.encoders.TextEncoder` without its parameters: ids ``[B, T]`` to ``[B, T, D]``.

    Positions after a caption's end are zeros.
    """

    def __init__(self, encoder: TextEncoder, precision: LinearPrecision = "fp32") -> None:
        super().__init__()
        self._embeddings: Tensor = encoder.token_embedding.weight.detach()
        self._positions: Tensor = encoder.positional_embedding.detach()
        self._blocks = [_Block(block, precision) for block in encoder.transformer.resblocks]
        self._head = _Head(encoder.ln_final, encoder.text_projection)

    def forward(self, ids: Tensor) -> Tensor:
        lengths = caption_lengths(ids)
        features = self._embeddings.new_zeros(*ids.shape, self._head.width)
        for numbers in _batches(lengths):
            # Of each token, caption by caption: which caption it is of, and where it stands there.
            caption, position = (torch.arange(ids.shape[1]) < lengths[numbers, None]).nonzero(as_tuple=True)
            x = F.embedding(ids[numbers[caption], position], self._embeddings) + self._positions[position]
            x, runs = _filled(x, _runs(lengths[numbers]))
            for block in self._blocks:
                block(x, runs, causal=True)
            features[numbers[caption], position] = self._head(x)[: len(caption)]
        return features


class _Block:
    """A residual block: attention, then an MLP."""

    def __init__(self, block: Any, precision: LinearPrecision) -> None:
        linear = partial(frozen_linear, precision=precision)
        attention, widen, narrow = block.attn, block.mlp.c_fc, block.mlp.c_proj
        quick = _QUICK if isinstance(block.mlp.gelu, QuickGELU) else None
        self._heads = attention.num_heads
        self._norm_1, self._norm_2 = _norm(block.ln_1), _norm(block.ln_2)
        self._project = linear(attention.in_proj_weight, attention.in_proj_bias)
        self._join = linear(attention.out_proj.weight, attention.out_proj.bias)
        if quick:
            self._widen = linear(widen.weight * quick, widen.bias * quick, "swish")
            self._narrow = linear(narrow.weight / quick, narrow.bias)
        else:
            self._widen, self._narrow = linear(widen.weight, widen.bias, "gelu"), linear(narrow.weight, narrow.bias)

    def __call__(self, x: Tensor, runs: Sequence[Run], *, causal: bool) -> None:
        """Add to the rows ``x [R, W]``, in place."""
        x += self._join(_attention(self._project(self._norm_1(x)), self._heads, runs, causal))
        x += self._narrow(self._widen(self._norm_2(x)))


class _Head:
    """The last norm and the projection: ``[R, W]`` to ``[R, D]``."""

    def __init__(self, norm: Any, projection: Any) -> None:  # open_clip is untyped
        self.width: int = projection.shape[1]
        self._norm = _norm(norm)
        self._project = frozen_linear(projection.T.contiguous(), None)

    def __call__(self, x: Tensor) -> Tensor:
        features: Tensor = self._project(self._norm(x))
        return features


def _attention(projected: Tensor, heads: int, runs: Sequence[Run], causal: bool) -> Tensor:
    """Queries, keys and values ``[R, 3 W]`` to ``[R, W]``; each item attends to itself."""
    mixed = []
    for rows, (items, length) in zip(projected.split([run.rows for run in runs]), runs, strict=True):
        # [B T, 3 W] -> [3, B, heads, T, W / heads], without a copy
        query, key, value = rows.view(items, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        values = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        mixed.append(values.transpose(1, 2).reshape(items * length, -1))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _batches(lengths: Tensor) -> Iterator[Tensor]:
    """Numbers of the captions that have tokens, in order of length, a few at a time."""
    order = lengths.argsort(stable=True)[int((lengths == 0).sum()) :]
    batch = (lengths[order].cumsum(0) - 1) // _ROWS
    return (numbers for numbers in order.split(batch.bincount().tolist()) if len(numbers))


def _filled(x: Tensor, runs: list[Run]) -> tuple[Tensor, list[Run]]:
    """Rows ``[R, W]`` with zeros behind them, which are an item of their own, up to one of few numbers of rows.

    The reason: :func:`finelip_fast.kernels.cpu.filled_rows`.
    """
    padding = filled_rows(len(x)) - len(x)
    return (F.pad(x, (0, 0, 0, padding)), [*runs, Run(1, padding)]) if padding else (x, runs)


def _runs(lengths: Tensor) -> list[Run]:
    """What lies one after another, of items in order of length."""
    values, counts = lengths.unique_consecutive(return_counts=True)
    return [Run(*pair) for pair in zip(counts.tolist(), values.tolist(), strict=True)]


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    shape, weight, bias, eps = norm.normalized_shape, norm.weight.detach(), norm.bias.detach(), norm.eps
    return lambda x: F.layer_norm(x, shape, weight, bias, eps)
