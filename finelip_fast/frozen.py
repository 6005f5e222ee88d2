"""The encoders as they run on a CPU: weights laid out once, captions without padding, nothing kept for gradients.

A block of CLIP's and SigLIP's transformers takes seven operations here: two norms, four linear layers and attention. The MLP's
activation is part of its first layer, and attention reads queries, keys and values where their joint projection wrote them.
The rows of all captions are concatenated, so that each costs only its own tokens; only attention handles one length at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finelip_fast.encoders import ImageEncoder, TextEncoder, caption_lengths, spread_positions
from finelip_fast.kernels import cpu
from finelip_fast.kernels.cpu import Activation, LinearPrecision, filled_rows, frozen_linear
from finelip_fast.model import FineLIP
from finelip_fast.transformer import QuickGELU

if TYPE_CHECKING:
    from finelip_fast.siglip import SigLIPImageEncoder, SigLIPTextEncoder

# QuickGELU is x * sigmoid(1.702 x), which is swish(1.702 x) / 1.702, and swish is what oneDNN has.
_QUICK = 1.702

# Rows that a transformer's blocks compute together, so that their widest activations stay in the cache.
_ROWS = 1600


class Run(NamedTuple):
    """Consecutive items of one length."""

    items: int
    length: int

    @property
    def rows(self) -> int:
        return self.items * self.length


def freeze(model: FineLIP, precision: LinearPrecision = "fp32") -> FineLIP:
    """Replace a model's encoders with frozen ones, which then hold the only copy of their weights.

    Args:
        model: Model in float32 on the CPU, in eval mode; changed in place, and afterwards only usable for
            :meth:`FineLIP.encode_image` and :meth:`FineLIP.encode_text`.
        precision: Precision of the blocks' linear layers and, if ``"bf16"``, of attention. Everything else is float32.

    Returns:
        The model.
    """
    text: nn.Module
    if isinstance(model.text, TextEncoder):
        text = FrozenTextEncoder(model.text, precision)
    else:
        text = FrozenSigLIPTextEncoder(model.text, precision)
    model.add_module("visual", FrozenImageEncoder(model.visual, precision))
    model.add_module("text", text)
    return model


def why_not(precision: str) -> str | None:
    """Return why this processor gains nothing from a precision; None if it has the instructions."""
    if precision == "bf16" and not cpu.has_bfloat16():
        return "this processor has no bfloat16 instructions"
    if precision == "int8" and not cpu.has_int8():
        return "this processor has no int8 instructions (AVX-512 VNNI)"
    return None


class FrozenImageEncoder(nn.Module):
    """An encoder of :mod:`finelip_fast.encoders` without its parameters: pixels ``[B, 3, H, W]`` to ``[B, 1 + P, D]``."""

    def __init__(self, encoder: ImageEncoder | SigLIPImageEncoder, precision: LinearPrecision = "fp32") -> None:
        super().__init__()
        positions = encoder.positional_embedding.detach()
        self._patch = encoder.conv1.kernel_size[0]
        self._embed = frozen_linear(encoder.conv1.weight.flatten(1), encoder.conv1.bias)
        self._blocks = [_Block(block, precision) for block in encoder.transformer.resblocks]
        self._head: _Head | _PoolingHead
        if isinstance(encoder, ImageEncoder):
            self._cls, self._positions = encoder.class_embedding.detach() + positions[:1], positions[1:]
            self._norm: Callable[[Tensor], Tensor] = _norm(encoder.ln_pre)
            self._head = _Head(encoder.ln_post, _transposed(encoder.proj))
        else:
            self._cls, self._positions = positions[:0], positions
            self._norm = nn.Identity()
            self._head = _PoolingHead(encoder.ln_post, encoder.attn_pool, len(positions))

    def forward(self, pixels: Tensor) -> Tensor:
        length = 1 + len(self._positions)
        features = pixels.new_empty(len(pixels), length, self._head.width)
        at_once = max(1, _ROWS // length)
        for first in range(0, len(pixels), at_once):
            batch = slice(first, first + at_once)
            features[batch] = self._encode(pixels[batch]).view(-1, length, self._head.width)
        return features

    def _encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels ``[B, 3, H, W]`` as features ``[B (1 + P), D]``."""
        # [B, 3, H, W] -> [B, 3, rows, p, columns, p] -> [B, rows, columns, 3, p, p]: a patch is a row of the product.
        patches = pixels.unflatten(3, (-1, self._patch)).unflatten(2, (-1, self._patch)).permute(0, 2, 4, 1, 3, 5)
        embedded = self._embed(patches.flatten(3).flatten(0, 2)).view(len(pixels), *self._positions.shape)
        x = torch.cat([self._cls.expand(len(pixels), -1, -1), embedded.add_(self._positions)], dim=1)
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
        self._head = _Head(encoder.ln_final, _transposed(encoder.text_projection))

    def forward(self, ids: Tensor) -> Tensor:
        lengths = caption_lengths(ids)
        features = self._embeddings.new_zeros(*ids.shape, self._head.width)
        for numbers in _batches(lengths):
            # For each token, caption by caption: the caption that it belongs to, and its position there.
            caption, position = (torch.arange(ids.shape[1]) < lengths[numbers, None]).nonzero(as_tuple=True)
            x = F.embedding(ids[numbers[caption], position], self._embeddings) + self._positions[position]
            x, runs = _filled(x, _runs(lengths[numbers]))
            for block in self._blocks:
                block(x, runs, causal=True)
            features[numbers[caption], position] = self._head(x)[: len(caption)]
        return features


class FrozenSigLIPTextEncoder(nn.Module):
    """:class:`finelip_fast.encoders.SigLIPTextEncoder` without its parameters: ids ``[B, T]`` to ``[B, T, D]``.

    Positions after a caption's end are zeros.
    """

    def __init__(self, encoder: SigLIPTextEncoder, precision: LinearPrecision = "fp32") -> None:
        super().__init__()
        self._end, self._padding = encoder.end_token, encoder.pad_token
        self._embeddings: Tensor = encoder.token_embedding.weight.detach()
        self._positions: Tensor = encoder.positional_embedding.detach()
        self._blocks = [_Block(block, precision) for block in encoder.transformer.resblocks]
        projection = encoder.text_projection
        self._head = _Head(encoder.ln_final, projection.weight, projection.bias)

    def forward(self, ids: Tensor) -> Tensor:
        lengths = caption_lengths(ids, self._end)
        features = self._embeddings.new_zeros(*ids.shape, self._head.width)
        ids = F.pad(ids, (0, max(0, len(self._positions) - ids.shape[1])))
        at = torch.arange(ids.shape[1])
        ids = ids.masked_fill(at >= lengths[:, None], self._padding)
        visible = lengths.clamp(min=len(self._positions)).masked_fill(lengths == 0, 0)
        for numbers in _batches(visible):
            # For each position, caption by caption: the caption that it belongs to, and its place there.
            caption, position = (at < visible[numbers, None]).nonzero(as_tuple=True)
            x = F.embedding(ids[numbers[caption], position], self._embeddings) + self._spread(visible[numbers])
            x, runs = _filled(x, _runs(visible[numbers]))
            for block in self._blocks:
                block(x, runs, causal=False)
            # The result at the last position replaces that of the end token, and the padding is left out.
            numbers, end = numbers[caption], lengths[numbers[caption]] - 1
            is_last = position == visible[numbers] - 1
            rows = ((position < end) | is_last).nonzero()[:, 0]
            features[numbers[rows], torch.where(is_last, end, position)[rows]] = self._head(x[rows])
        return features

    def _spread(self, lengths: Tensor) -> Tensor:
        """Positions ``[R, W]`` of captions sorted by length."""
        parts = [
            spread_positions(self._positions, torch.tensor([run.length]), run.length)[0].repeat(run.items, 1)
            for run in _runs(lengths)
        ]
        return torch.cat(parts)


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
            self._widen = linear(widen.weight, widen.bias, _gelu(block.mlp.gelu))
            self._narrow = linear(narrow.weight, narrow.bias)

    def __call__(self, x: Tensor, runs: Sequence[Run], *, causal: bool) -> None:
        """Add the block's output to the rows ``x [R, W]``, in place."""
        x += self._join(_attention(self._project(self._norm_1(x)), self._heads, runs, causal))
        x += self._narrow(self._widen(self._norm_2(x)))


class _Head:
    """The last norm and the projection: ``[R, W]`` to ``[R, D]``."""

    def __init__(self, norm: Any, projection: Any, bias: Any = None) -> None:
        self.width: int = projection.shape[0]
        self._norm = _norm(norm)
        self._project = frozen_linear(projection.contiguous(), bias)

    def __call__(self, x: Tensor) -> Tensor:
        features: Tensor = self._project(self._norm(x))
        return features


class _PoolingHead:
    """The last norm and :class:`finelip_fast.encoders.AttentionPool`: ``[B P, W]`` to ``[B (1 + P), W]``."""

    def __init__(self, norm: Any, pool: Any, patches: int) -> None:  # timm is untyped
        self.width: int = pool.out_features
        self._patches, self._heads = patches, pool.num_heads
        self._norm, self._norm_2 = _norm(norm), _norm(pool.norm)
        self._query: Tensor = pool.q(pool.latent).detach()
        self._project = frozen_linear(pool.kv.weight, pool.kv.bias)
        self._join = frozen_linear(pool.proj.weight, pool.proj.bias)
        widen, narrow = pool.mlp.fc1, pool.mlp.fc2
        self._widen = frozen_linear(widen.weight, widen.bias, _gelu(pool.mlp.act))
        self._narrow = frozen_linear(narrow.weight, narrow.bias)

    def __call__(self, x: Tensor) -> Tensor:
        key, value = self._project(self._norm(x)).view(-1, self._patches, 2 * self.width).chunk(2, dim=-1)
        query = self._query.expand(len(key), -1, -1)
        split = [rows.unflatten(-1, (self._heads, -1)).transpose(1, 2) for rows in (query, key, value)]
        gathered = F.scaled_dot_product_attention(split[0], split[1], split[2]).transpose(1, 2).flatten(2)
        rows = self._join(torch.cat([gathered, value], dim=1).flatten(0, 1))
        return rows.add_(self._narrow(self._widen(self._norm_2(rows))))


def _transposed(projection: Any) -> Tensor:
    columns: Tensor = projection.T
    return columns


def _gelu(activation: nn.Module) -> Activation:
    return "gelu_tanh" if getattr(activation, "approximate", "none") == "tanh" else "gelu"


def _attention(projected: Tensor, heads: int, runs: Sequence[Run], causal: bool) -> Tensor:
    """Attend within each item: queries, keys and values ``[R, 3 W]`` to ``[R, W]``."""
    mixed = []
    for rows, (items, length) in zip(projected.split([run.rows for run in runs]), runs, strict=True):
        # [B T, 3 W] -> [3, B, heads, T, W / heads], without a copy
        query, key, value = rows.view(items, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        values = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        mixed.append(values.transpose(1, 2).reshape(items * length, -1))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _batches(lengths: Tensor) -> Iterator[Tensor]:
    """Indices of the captions that have tokens, sorted by length and split into batches."""
    order = lengths.argsort(stable=True)[int((lengths == 0).sum()) :]
    batch = (lengths[order].cumsum(0) - 1) // _ROWS
    return (numbers for numbers in order.split(batch.bincount().tolist()) if len(numbers))


def _filled(x: Tensor, runs: list[Run]) -> tuple[Tensor, list[Run]]:
    """Pad rows ``[R, W]`` with an item of zeros, up to one of a few numbers of rows.

    For the reason see :func:`finelip_fast.kernels.cpu.filled_rows`.
    """
    padding = filled_rows(len(x)) - len(x)
    return (F.pad(x, (0, 0, 0, padding)), [*runs, Run(1, padding)]) if padding else (x, runs)


def _runs(lengths: Tensor) -> list[Run]:
    """Runs of items sorted by length."""
    values, counts = lengths.unique_consecutive(return_counts=True)
    return [Run(*pair) for pair in zip(counts.tolist(), values.tolist(), strict=True)]


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    shape, weight, bias, eps = norm.normalized_shape, norm.weight.detach(), norm.bias.detach(), norm.eps
    return lambda x: F.layer_norm(x, shape, weight, bias, eps)
