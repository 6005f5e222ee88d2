"""Sketches: rows of items in one or two bits per column, and late interaction estimated from them.

This first stage of two compares tokens. It follows RaBitQ (arXiv 2405.12497, and 2409.09913 for several bits): rows are
rotated, each column is rounded to a code of few bits, and a factor makes the products unbiased. Three things are new:

- **The bytes go where the rows are.** A model's rows lie mostly in a few directions. The same bytes can hold all columns in
  one bit each, half of them in two, or a quarter in four, of the leading principal directions. :func:`sketch_basis` chooses
  the most informative option. A quarter of the columns also means a quarter of the multiplications.
- **One step and one factor for all rows.** After rotation, unit rows are nearly equal in length in every column. Separate
  factors per row gave no better results, and without them, only a product and two maxima of integers are left to compute.
- **Columns of a row add up to zero**: the rotation leaves out the direction ``(1, ..., 1)``. A code ``c`` represents
  ``step (c - (2^b - 1) / 2)``, and a constant subtracted from all columns does not change a product with such a row.

Codes of a block of items are stored byte by byte, token by token, ``[bytes, L, n]``. Unpacked, they are the right operand of
the product ``[L_q, k] @ [k, L n]``, whose maxima over either side's tokens run along the items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from finelip_fast._arguments import whole_number
from finelip_fast.errors import InputError
from finelip_fast.kernels import cpu, derivatives
from finelip_fast.kernels.checks import check_alpha, check_floats
from finelip_fast.kernels.clim.candidates import cosines_int8, merged
from finelip_fast.kernels.clim.cpu import Scratch
from finelip_fast.kernels.clim.formula import LEAKY_SLOPE
from finelip_fast.kernels.clim.quantize import quantize
from finelip_fast.kernels.clim.rows import Pieces, Rows
from finelip_fast.kernels.threads import alone, side_by_side

BITS = (1, 2)
_LARGEST_WIDTH = 8192  # principal directions of this width are found in a minute
# Steps of the best uniform quantisers of a normal variable by number of bits, and the share of its variance that they lose
# (Max, Quantizing for minimum distortion, 1960).
_STEPS = {1: 1.5958, 2: 0.9957, 4: 0.3352}
_LOST = {1: 0.3634, 2: 0.1188, 4: 0.01154}
_MOST_BLOCK, _BLOCK_CODES = 2048, 1 << 21  # items; codes, one byte each when unpacked, within a cache
_ESTIMATES_AT_ONCE = 1 << 22  # 16 MiB
_LARGEST = 127
_BYTES = 0x0101010101010101


class SketchBasis(NamedTuple):
    """Definition of the codes of items.

    Attributes:
        projection: float32 ``[D, k]``; products of rows with it are rounded to codes.
        bits: Bits of a code, ``b``: 1, 2 or 4.
        step: Difference between the numbers that neighbouring codes represent when rows are rounded.
        unit: The same difference when products are estimated, which makes the estimates unbiased.
        error: Expected standard error of the cosine of two rows.
    """

    projection: Tensor
    bits: int
    step: float
    unit: float
    error: float

    @property
    def row_bytes(self) -> int:
        return self.projection.shape[1] * self.bits // 8

    def block_items(self, tokens: int) -> int:
        """Number of items in a block, of ``L = tokens`` rows each."""
        return max(32, min(_MOST_BLOCK, _BLOCK_CODES // (tokens * self.projection.shape[1]) // 32 * 32))


def row_bytes(width: int, bits: int) -> int:
    """Bytes of a row in a sketch with this number of bits for each of ``D`` columns, a multiple of 8."""
    return 8 * math.ceil(bits * width / 64)


def sketch_basis(rows: Tensor, *, bits: int = 1) -> SketchBasis:
    """Find a basis for rows like these.

    With ``l`` the eigenvalues of the rows' second moments, the cosine of two such rows has the variance ``C = sum l_i^2``. Its
    estimate from ``k`` columns in ``b`` bits has the variance ``C_k = sum_{i < k} l_i^2`` plus the noise of the codes,
    ``n = (sum_{i < k} l_i)^2 d_b / k``, so its correlation with the cosine is ``sqrt(C_k^2 / (C (C_k + n)))``. The choice
    with the highest correlation is used.

    Args:
        rows: ``[n, D]``, unit rows; a sample of a few thousand is enough.
        bits: Bits per column, 1 or 2, for ``D bits / 8`` bytes per row; see :func:`row_bytes`.

    Raises:
        InputError: No rows, rows not of a float dtype or wider than 8192, or another number of bits.
    """
    check_bits(bits)
    check_floats("rows", rows)
    if rows.ndim != 2 or not len(rows) or not 0 < rows.shape[1] <= _LARGEST_WIDTH:
        raise InputError(f"expected rows [n, D], n from 1 and D from 1 to {_LARGEST_WIDTH}, got {list(rows.shape)}")
    rows, width = rows.detach().cpu().float(), rows.shape[1]
    energies, directions = torch.linalg.eigh((rows.T @ rows).double() / len(rows))
    energies, directions = energies.flip(0).clamp_min(0), directions.flip(1)
    varied = energies.square().sum().clamp_min(1e-30)
    choices = []
    for code_bits, lost in _LOST.items():
        columns = 8 * row_bytes(width, bits) // code_bits
        leading = energies[: columns - 1]
        noise = lost / (1 - lost) * leading.sum().square() / columns
        captured = leading.square().sum()
        correlation = (captured.square() / (varied * (captured + noise)).clamp_min(1e-30)).item()  # its square
        choices.append((correlation, columns, code_bits, (captured / varied).item()))
    correlation, columns, code_bits, share = max(choices)
    error = math.sqrt(varied.item() * max(0.0, 1 / max(correlation, 1e-9) - 1))
    directions = directions[:, : columns - 1]
    projection = (directions @ _zero_sum_rotation(columns)[:, : directions.shape[1]].T).float()
    projected = rows @ projection
    step = _STEPS[code_bits] * projected.square().mean().sqrt().item() or 1.0  # rows of zeros
    centred = _codes(projected, step, code_bits) - (2**code_bits - 1) / 2
    agreement = (projected * centred).sum().item()
    unit = projected.square().sum().item() / (agreement * share) if agreement > 0 else step
    return SketchBasis(projection, code_bits, step, unit, error)


def check_bits(bits: Any) -> None:
    """
    Raises:
        InputError: The number of bits is not one that a sketch may have.
    """
    if isinstance(bits, bool) or bits not in BITS:
        raise InputError(f"expected bits to be 1 or 2 per column, got {bits!r:.80}")


def _zero_sum_rotation(columns: int) -> Tensor:
    """Random orthonormal directions ``[k, k - 1]``, the same every time, each with elements that add up to zero."""
    drawn = torch.randn(columns, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn[:, 0] = 1
    rotation: Tensor = torch.linalg.qr(drawn).Q
    return rotation[:, 1:]


def _codes(projected: Tensor, step: float, bits: int) -> Tensor:
    codes: Tensor = (projected / step + (2**bits - 1) / 2).round_().clamp_(0, 2**bits - 1)
    return codes


def sketch_items(items: Tensor, basis: SketchBasis) -> Tensor:
    """Encode ``items [N, L, D]`` as uint8 ``[N L row_bytes]``, block by block; :func:`blocks` splits the result.

    Raises:
        InputError: Items of another width.
    """
    if items.ndim != 3 or items.shape[2] != len(basis.projection):
        raise InputError(f"expected items [N, L, {len(basis.projection)}], got {list(items.shape)}")
    packed = [_packed(block, basis) for block in items.split(basis.block_items(items.shape[1]))]
    return torch.cat([codes.flatten() for codes in packed] or [torch.empty(0, dtype=torch.uint8)])


def _packed(items: Tensor, basis: SketchBasis) -> Tensor:
    """Codes of a block, uint8 ``[bytes, L, n]``.

    A byte has two halves of ``4 / b`` codes; the ``j``-th byte of a row holds column ``j`` of each half and place.
    """
    n_items, tokens, width = items.shape
    rows = items.detach().cpu().float().transpose(0, 1).reshape(-1, width)
    codes = _codes(cpu.layer(rows, basis.projection.T), basis.step, basis.bits).to(torch.uint8)
    codes = codes.T.reshape(2, 4 // basis.bits, basis.row_bytes, tokens, n_items)
    packed = torch.zeros(codes.shape[2:], dtype=torch.uint8)
    for half, places in enumerate(codes):
        for place, part in enumerate(places):
            packed |= part << (4 * half + basis.bits * place)
    return packed


def blocks(codes: Tensor, tokens: int, basis: SketchBasis) -> list[Tensor]:
    """Split the result of :func:`sketch_items` into blocks ``[bytes, L, n]``, without a copy."""
    item_bytes = tokens * basis.row_bytes
    parts = codes.split(item_bytes * basis.block_items(tokens))
    return [part.view(basis.row_bytes, tokens, -1) for part in parts if len(part)]


def sketch_candidates(
    queries: Tensor,
    basis: SketchBasis,
    blocks: Sequence[Tensor],
    items: Rows,
    item_scales: Rows,
    count: int,
    *,
    alpha: float,
    among: Tensor | None = None,
) -> Tensor:
    """Find the ``count`` items with the highest scores for each query, with late interaction estimated from sketches.

    Args:
        queries: ``[Q, L_q, D]``, unit rows.
        basis, blocks: As for :func:`fine_estimates`.
        items, item_scales: Global embeddings in int8 and their scales, on the CPU, as for
            :func:`finelip_fast.kernels.cosine_candidates`; used for the cosine.
        count: Number of items; all items if there are fewer.
        alpha: Weight of the global cosine.
        among: The only items to consider, int64 ``[n]``, ascending, each once; None means all.

    Returns:
        int64 ``[Q, min(count, n)]`` on the CPU, in ascending order, not by score.

    Raises:
        InputError: Shapes that do not fit together, ``count < 1``, or an alpha outside [0, 1].
        KernelError: Call under ``torch.func`` or in forward mode: a search has no derivative.
    """
    derivatives.refuse("sketch_candidates", "search outside of it, and take clim_scores of the items found", queries)
    check_floats("queries", queries)
    check_alpha(alpha)
    count = whole_number("count", count)
    globals_, scales, width = Pieces(items), Pieces(item_scales), len(basis.projection)
    ends = _ends(blocks)
    if queries.ndim != 3 or queries.shape[2] != width or globals_.shape != (ends[-1], width):
        raise InputError(
            f"expected queries [Q, L, {width}] and global embeddings of the {ends[-1]} items of the blocks, got "
            f"{list(queries.shape)} and {list(globals_.shape)}"
        )
    is_searched = None
    if among is not None:
        is_searched = torch.zeros(ends[-1], dtype=torch.bool)
        is_searched[among.cpu()] = True
        count = min(count, len(among))
    if not count or not len(queries):
        return torch.empty(len(queries), 0, dtype=torch.int64)
    queries = queries.detach().cpu()
    anchors, anchor_scales = quantize(queries[:, :1])
    best = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    first = 0
    while first < len(blocks):
        last = first + 1
        while last < len(blocks) and (ends[last + 1] - ends[first]) * len(queries) <= _ESTIMATES_AT_ONCE:
            last += 1
        within = range(ends[first], ends[last])

        def cosines(start: int, stop: int, offset: int = within.start) -> Tensor:
            parts = (part.read(offset + start, offset + stop) for part in (globals_, scales))
            return cosines_int8(anchors[:, 0], *parts).mul_(alpha * anchor_scales)

        scores = _estimates(queries, basis, blocks[first:last], 1 - alpha, cosines)
        if is_searched is not None:
            scores.masked_fill_(~is_searched[within.start : within.stop], -torch.inf)
        best = alone(partial(merged, best, scores, within.start, count))
        first = last
    return best[1]


def _ends(blocks: Sequence[Tensor]) -> list[int]:
    """Start of each block, and end of the last one."""
    return [0, *accumulate(block.shape[2] for block in blocks)]


def fine_estimates(queries: Tensor, basis: SketchBasis, blocks: Sequence[Tensor]) -> Tensor:
    """Estimate ``fine``, late interaction without the global cosine.

    Args:
        queries: ``[Q, L_q, D]``, unit rows.
        basis: Basis of the blocks.
        blocks: Codes ``[bytes, L, n]``, contiguous, for consecutive blocks of items.

    Returns:
        float32 ``[Q, N]`` on the CPU. Additional memory per thread: one byte for each code of a block, and 4 for each
        similarity with a query.
    """
    return _estimates(queries, basis, blocks, 1.0, None)


def _estimates(
    queries: Tensor,
    basis: SketchBasis,
    blocks: Sequence[Tensor],
    weight: float,
    offset: Callable[[int, int], Tensor] | None,
) -> Tensor:
    """Weighted estimates of ``fine``, plus ``offset(first, last)`` for the items of each block."""
    ends = _ends(blocks)
    if not len(queries) or not blocks:
        return torch.empty(len(queries), ends[-1])
    weights, units = alone(partial(_weights, queries, basis))
    scratch = Scratch()

    def block_estimates(number: int) -> Tensor:
        block = blocks[number]
        codes = _unpacked(block, basis.bits, scratch)
        fine = [_fine(query, codes, block.shape[1], scratch) for query in weights]
        estimates = torch.stack(fine).mul_(weight * units[:, None])
        return estimates if offset is None else estimates.add_(offset(ends[number], ends[number + 1]))

    return torch.cat(side_by_side(block_estimates, range(len(blocks))), dim=1)


def _weights(queries: Tensor, basis: SketchBasis) -> tuple[Tensor, Tensor]:
    """Integers ``[Q, L_q, k]`` whose products with unpacked codes are similarities, and the unit of each query.

    An unpacked code at place ``p`` of its half is ``2^(b p)`` times too large, so its weight is smaller by that factor.
    """
    # One by one: products may round differently among other rows, and a query's candidates must not depend on its batch.
    projected = torch.stack([query @ basis.projection for query in queries.detach().cpu().float()])
    units = projected.abs().amax(dim=(1, 2)).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
    weights = projected / units[:, None, None]
    places = weights.unflatten(2, (2, 4 // basis.bits, basis.row_bytes))
    places /= 2.0 ** (basis.bits * torch.arange(places.shape[3])[:, None])
    return weights.round_().to(torch.int8), units * basis.unit


def _unpacked(block: Tensor, bits: int, scratch: Scratch) -> Tensor:
    """Codes of a block, int8 ``[k, L n]``, up to the powers of :func:`_weights`."""
    words, places = block.reshape(-1).view(torch.int64), 4 // bits  # eight bytes at once
    low, high = scratch("codes", (2, places, len(words)), torch.int64)
    shifted = torch.bitwise_right_shift(words, 4, out=high[-1])
    for place in range(places):
        mask = ((2**bits - 1) << (bits * place)) * _BYTES
        torch.bitwise_and(words, mask, out=low[place])
        torch.bitwise_and(shifted, mask, out=high[place])
    codes = scratch("codes", (2 * places * len(words),), torch.int64).view(torch.int8)
    return codes.view(2 * places * len(block), -1)


def _fine(weights: Tensor, codes: Tensor, tokens: int, scratch: Scratch) -> Tensor:
    """``fine`` of a query ``[L_q, k]`` and a block ``[k, L n]``, ``[n]``, in the query's unit."""
    shape = query_tokens, tokens, n_items = len(weights), tokens, codes.shape[1] // tokens
    dtype = torch.int32 if cpu.has_int8() else torch.float32  # exact in either
    similarity = scratch("product", shape, dtype)
    if dtype == torch.int32:
        torch._int_mm(weights, codes, out=similarity.view(query_tokens, -1))  # pyright: ignore[reportPrivateImportUsage]
    else:
        right = scratch("right", codes.shape).copy_(codes)
        torch.mm(weights.float(), right, out=similarity.view(query_tokens, -1))
    maxima = scratch("maxima", (query_tokens + tokens, n_items), dtype)
    torch.amax(similarity, dim=1, out=maxima[:query_tokens])
    torch.amax(similarity, dim=0, out=maxima[query_tokens:])
    wide = scratch("wide", maxima.shape).copy_(maxima)
    shares = torch.tensor([1 / query_tokens] * query_tokens + [1 / tokens] * tokens)
    return shares @ F.leaky_relu_(wide, LEAKY_SLOPE)
