"""Late interaction on the CPU: blocks of similarities that stay in the cache, and the fastest product that is exact enough.

Items are rows, 64 queries at a time are columns, and both maxima of a tile ``[items, L_i, L_q, queries]`` run along axes
that PyTorch vectorises. With few queries, and if MKL multiplies, items run along the last axis. The accuracy of the dot
product of ``a`` and ``b`` depends on the dtype:

- float32 and float16: a float32 product, off by at most ``D 2^-24 |a| |b|``.
- bfloat16 with AMX: PyTorch has no CPU product of bfloat16 matrices with a float32 result, so two products take its place.
  The first is rounded to bfloat16; the second subtracts the first from the same float32 sum before rounding, so it holds what
  the first lost. That adds an error of ``2^-18`` of the result. The global cosine, most of the score, is a float32 product.
- bfloat16 otherwise: as float32.
- in a search, with bfloat16 instructions: one product with rows and result rounded to bfloat16, off by at most
  :func:`rounding_error`. The search allows for this error and rescores the items that it leaves open.
- int8 with a float32 scale for each row: an exact sum (up to ``D = 1040`` without int8 instructions), then three roundings.

The float32 products follow ``torch.set_float32_matmul_precision``: anything but "highest" makes them less exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from threading import get_ident
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from finelip_fast.kernels import cpu
from finelip_fast.kernels.clim.formula import LEAKY_SLOPE
from finelip_fast.kernels.threads import LEAST_SHARED_WORK, side_by_side, size_of_blocks

# With fewer columns than this, a maximum over an outer axis is not vectorised.
_BLOCK_QUERIES = 64
# Maxima over whole groups of this many columns are vectorised, those over what is left are several times as slow. The tokens
# of a single query are filled up to whole groups if the product is cheap and becomes at most so many times as large.
_GROUP, _MOST_FILLED = 32, 1.5
# Elements of a tile for each thread, 1 MiB in float32: the maxima read it from the L2 cache.
_TILE_ELEMENTS = 1 << 18
# Similarities are arranged along the items if MKL multiplies and queries times their tokens squared are at most this: with
# more or longer queries, the arrangement costs more than it saves. Then a block of items and its similarities have so many
# elements, 4 MiB in float32, and there are at least so many items.
_ALONG_WORK, _ALONG_ELEMENTS, _LEAST_ALONG = 1 << 13, 1 << 20, 96
# Elements of one product; larger than a tile, because a product rearranges its operands first.
_PRODUCT_ELEMENTS = 1 << 21
# Elements of the items of a product: large enough that threads do not wait for the interpreter, which they share, and small
# enough that copies of the items in another dtype are still in the cache when they are multiplied.
_BLOCK_ELEMENTS = 1 << 21
# With AMX and a few queries, a block in int8 is multiplied in so many products, which copy what they need, and reduced in
# larger tiles: otherwise, with products as fast as these, threads wait for the interpreter.
_INT8_PRODUCTS, _INT8_TILE_ELEMENTS = 8, 1 << 19
# Elements of items that can be copied in the time it takes to begin another block.
_FEW_ELEMENTS = 1 << 20
# Smaller blocks of items are padded to this number of elements, unless that is already enough work to share.
_LEAST_ELEMENTS = 1 << 18
# Below this many multiplications, PyTorch does not guarantee oneDNN for both bfloat16 products.
_LEAST_BFLOAT16_WORK = 1 << 16


def scores(
    queries: Tensor,
    items: Tensor,
    *,
    alpha: float,
    query_scales: Tensor | None = None,
    item_scales: Tensor | None = None,
    rounded: bool = False,
) -> Tensor:
    """Compute the scores of :func:`finelip_fast.kernels.clim_scores` on the CPU, without a gradient.

    Args:
        queries: ``[Q, L_q, D]``, float32, float16, bfloat16, or int8 with scales.
        items: ``[N, L_i, D]``; int8 if the queries are.
        alpha: Weight of the global cosine.
        query_scales, item_scales: For int8, float32 ``[Q, L_q]`` and ``[N, L_i]``: a row is its integers times its scale.
        rounded: Whether to round rows and products to bfloat16 if :func:`rounding_error` says that is faster; not for int8.

    Returns:
        float32 ``[Q, N]``. Memory beyond inputs and result: a float32 copy of 64 queries; 8 MiB of items in float32, 8 MiB of
        products and 2 MiB for each thread; more only if a few items need more.
    """
    n_queries, query_tokens, width = queries.shape
    n_items, item_tokens, _ = items.shape
    result = torch.zeros(n_queries, n_items)
    if 0 in (n_queries, n_items, query_tokens, item_tokens, width):
        return result
    if query_tokens == item_tokens == 1 and query_scales is None:
        return _scores_of_single_rows(queries, items, alpha)
    has_special_products = cpu.prefers_onednn() if query_scales is None else cpu.has_int8()
    if n_queries < _BLOCK_QUERIES and n_queries * query_tokens**2 <= _ALONG_WORK and not has_special_products:
        return _scores_along_items(queries, items, alpha, query_scales, item_scales)
    is_prepared = query_scales is not None and cpu.prepares_int8()
    filled = _filled(query_tokens) if n_queries == 1 and (rounded or is_prepared) else query_tokens
    per_pair = filled * item_tokens
    block_queries = max(1, min(_BLOCK_QUERIES, n_queries, _PRODUCT_ELEMENTS // per_pair))
    products, tile_elements = 1, _TILE_ELEMENTS
    if is_prepared and n_queries < _BLOCK_QUERIES:
        products, tile_elements = _INT8_PRODUCTS, _INT8_TILE_ELEMENTS
    blocks = _blocks(n_items, item_tokens, block_queries * filled, width, products)
    scratch = Scratch()

    def block_scores(block: _Block, columns: _Columns) -> Tensor:
        rows, scales = block.of(items), None if item_scales is None else block.of(item_scales)
        tile_items = max(1, torch.get_num_threads() * tile_elements // (block_queries * per_pair))
        tiles = _tiles(rows, scales, columns, tile_items * item_tokens, rounded, scratch)
        fine = _fine(tiles, len(rows), item_tokens, columns, tile_items, scratch)
        cosine = _anchors(rows, scales) @ columns.anchors
        return (alpha * cosine + (1 - alpha) * fine).T

    with torch.no_grad():
        for query_block in _slices(n_queries, block_queries):
            some_scales = None if query_scales is None else query_scales[query_block]
            columns = _columns(queries[query_block], some_scales, filled, reused=len(blocks) > 1)
            for block, part in zip(blocks, side_by_side(partial(block_scores, columns=columns), blocks), strict=True):
                result[query_block, block.start : block.stop] = part[:, : block.stop - block.start]
    return result


def _scores_along_items(
    queries: Tensor, items: Tensor, alpha: float, query_scales: Tensor | None, item_scales: Tensor | None
) -> Tensor:
    """Scores of a few queries by float32 products of MKL, from similarities ``[q, L_q, L_i, n]``.

    Items run along the fastest axis, so that both maxima are vectorised however few queries there are. oneDNN would lay out
    the items anew for such a product.
    """
    n_queries, query_tokens, width = queries.shape
    n_items, item_tokens, _ = items.shape
    tokens, scratch = queries.reshape(-1, width).float(), Scratch()
    per_item = len(tokens) * item_tokens
    largest = max(1, min(max(_LEAST_ALONG, _ALONG_ELEMENTS // (item_tokens * width)), _ALONG_ELEMENTS // per_item))
    least = -(-LEAST_SHARED_WORK // (per_item * width))
    size = size_of_blocks(n_items, min(largest, max(least, -(-n_items // torch.get_num_threads()))))
    shares = (1 - alpha) * torch.tensor([1 / query_tokens] * query_tokens + [1 / item_tokens] * item_tokens)

    def block_scores(start: int) -> Tensor:
        block = items[start : start + size].transpose(0, 1)
        rows = scratch("rows", block.shape).copy_(block)
        shape = n_queries, query_tokens, item_tokens, rows.shape[1]
        product = torch.mm(tokens, rows.view(-1, width).T, out=scratch("product", (len(tokens), len(rows) * shape[3])))
        similarity = product.view(shape)
        if query_scales is not None and item_scales is not None:
            similarity *= item_scales[start : start + size].T
            similarity *= query_scales[:, :, None, None]
        maxima = scratch("maxima", (n_queries, query_tokens + item_tokens, shape[3]))
        torch.amax(similarity, dim=2, out=maxima[:, :query_tokens])
        torch.amax(similarity, dim=1, out=maxima[:, query_tokens:])
        return torch.add(shares @ F.leaky_relu_(maxima, LEAKY_SLOPE), similarity[:, 0, 0], alpha=alpha)

    with torch.no_grad():
        return torch.cat(side_by_side(block_scores, range(0, n_items, size)), dim=1)


class _Block(NamedTuple):
    """Items from ``start`` up to but excluding ``stop``, padded with zeros to ``size``."""

    start: int
    stop: int
    size: int

    def of(self, items: Tensor) -> Tensor:
        """A view, or a padded copy, of this block of the items ``[N, ...]``."""
        block = items[self.start : self.stop]
        padding = self.size - len(block)
        return F.pad(block, (*[0, 0] * (block.ndim - 1), 0, padding)) if padding else block


def _blocks(n_items: int, item_tokens: int, columns: int, width: int, products: int = 1) -> list[_Block]:
    """Blocks of items that one thread scores at once, or all threads if there is too little work to share.

    A size below the largest is a power of two, or 1.5 times one if items are padded, so that a growing collection has few
    sizes: oneDNN keeps what it prepares for each (:func:`finelip_fast.kernels.cpu.filled_rows`).
    """
    largest = max(1, products * _rows_at_once(columns, width) // item_tokens)
    least = -(-LEAST_SHARED_WORK // (item_tokens * columns * width))
    shared = max(_power_of_two(2 * least - 1), _power_of_two(n_items // torch.get_num_threads() or 1))
    size = min(largest, shared)
    fewest = _power_of_two(max(1, min(largest, least, _LEAST_ELEMENTS // (item_tokens * width))))
    start = n_items // size * size
    blocks = [_Block(first, first + size, size) for first in range(0, start, size)]
    while start < n_items:
        rest = n_items - start
        if rest * item_tokens * width > _FEW_ELEMENTS:
            rest = _power_of_two(rest)
        half = max(_power_of_two(rest) // 2, fewest)
        blocks.append(_Block(start, start + rest, -(-rest // half) * half))
        start += rest
    return blocks


def _rows_at_once(columns: int, width: int) -> int:
    """Number of rows of a product."""
    return min(_BLOCK_ELEMENTS // width, _PRODUCT_ELEMENTS // columns)


def _power_of_two(number: int) -> int:
    """Largest power of two up to a number."""
    return 1 << (number.bit_length() - 1)


def _scores_of_single_rows(queries: Tensor, items: Tensor, alpha: float) -> Tensor:
    """Scores of sets of one row each, which depend only on their cosine: ``fine`` follows from it."""
    scratch, parts = Scratch(), []
    # Both sides are copied even if they are float32: oneDNN takes hundreds of times as long on rows with gaps between them.
    columns = _anchors(queries, None).contiguous().T
    with torch.no_grad():
        for block in items.split(max(1, _BLOCK_ELEMENTS // items.shape[2])):
            rows = scratch("rows", (cpu.filled_rows(len(block)), block.shape[2]))
            rows[: len(block)].copy_(block[:, 0])
            parts.append(cpu.product(rows, columns)[: len(block)])
        cosines = torch.cat(parts).T.contiguous()
        return alpha * cosines + (1 - alpha) * 2 * F.leaky_relu(cosines, LEAKY_SLOPE)


def _filled(tokens: int) -> int:
    """Number of tokens that a query is filled up to."""
    filled = -(-tokens // _GROUP) * _GROUP
    return filled if filled <= _MOST_FILLED * tokens else tokens


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, total, size))


@dataclass
class _Columns:
    """A block of ``q`` queries, the right-hand side of products.

    Attributes:
        tokens: ``[w, D]``, ``w = q * L``, contiguous. Of the ``L`` tokens of a query, those after ``L_q`` repeat row 0.
        scales: ``[1, w]`` for int8.
        anchors: Row 0 of each query, float32 ``[D, q]``.
        shape: ``(q, L_q)``.
        token_major: Whether one token of all queries, not all tokens of one query, is contiguous: what is faster for maxima.
        reused: Whether more than one block of items is multiplied by them.
    """

    tokens: Tensor
    scales: Tensor | None
    anchors: Tensor
    shape: tuple[int, int]
    token_major: bool
    reused: bool

    @property
    def filled(self) -> int:
        """Number of tokens of a query, ``L``."""
        return len(self.tokens) // self.shape[0]

    @cached_property
    def transposed(self) -> Tensor:
        """``[D, w]``, contiguous; a clone, because with ``D = 1`` any strides count as contiguous."""
        return self.tokens.T.clone(memory_format=torch.contiguous_format)

    @cached_property
    def int8_product(self) -> Callable[[Tensor], Tensor]:
        """Function from int8 rows ``[m, D]`` to their scaled products with the columns, float32 ``[m, w]``."""
        assert self.scales is not None
        return cpu.scaled_int8(self.tokens, self.scales[0])

    @cached_property
    def wide(self) -> Tensor:
        """``[D, w]`` in float32."""
        return self.transposed.float()

    @cached_property
    def narrow_packed(self) -> Tensor:
        """Columns laid out for oneDNN in bfloat16, ``[w, D]``."""
        return self._packed(self.tokens.bfloat16())

    @cached_property
    def wide_packed(self) -> Tensor:
        """Columns laid out for oneDNN in float32, ``[w, D]``."""
        return self._packed(self.tokens.float())

    def _packed(self, tokens: Tensor) -> Tensor:
        """Lay out tokens for oneDNN if several blocks use them: for a single block, oneDNN does so itself, at less cost."""
        return cpu.packed(tokens) if self.reused else tokens


def _columns(block: Tensor, scales: Tensor | None, filled: int, *, reused: bool) -> _Columns:
    n_queries, tokens, width = block.shape
    token_major = n_queries >= _BLOCK_QUERIES
    anchors = _anchors(block, scales).T
    if filled > tokens:  # a copy of row 0 changes no maximum over the tokens
        order = [*range(tokens), *[0] * (filled - tokens)]
        block, scales = block[:, order], None if scales is None else scales[:, order]
    # A reshape of rows with gaps, such as row 0 of each set, is a view, on which oneDNN takes hundreds of times as long.
    arranged = (block.transpose(0, 1) if token_major else block).reshape(-1, width).contiguous()
    if scales is not None:
        scales = (scales.T if token_major else scales).reshape(1, -1)
    return _Columns(arranged, scales, anchors, (n_queries, tokens), token_major, reused)


def _anchors(block: Tensor, scales: Tensor | None) -> Tensor:
    """Row 0 of each set, float32 ``[n, D]``."""
    return block[:, 0].float() if scales is None else block[:, 0] * scales[:, :1]


def _tiles(
    items: Tensor, scales: Tensor | None, columns: _Columns, height: int, rounded: bool, scratch: Scratch
) -> Iterator[Tensor]:
    """Similarities of a block of items, ``[height, w]`` at a time."""
    rows = items.reshape(-1, items.shape[2])
    if scales is not None and columns.scales is not None:
        if cpu.prepares_int8():
            return _prepared_int8_tiles(rows, columns, scales.reshape(-1, 1), height, scratch)
        return _int8_tiles(rows, columns, scales.reshape(-1, 1), columns.scales, height, scratch)
    if rounded:
        return _rounded_tiles(rows, columns, height, scratch)
    if _bfloat16_pays(rows, columns.tokens):
        return _bfloat16_tiles(rows, columns.transposed, height, scratch)
    return _float32_tiles(rows, columns, height, scratch)


def _fine(
    tiles: Iterable[Tensor], n_items: int, item_tokens: int, columns: _Columns, tile_items: int, scratch: Scratch
) -> Tensor:
    """Reduce tiles ``[tile_items * L_i, w]`` of similarities to ``fine``, ``[n, q]``."""
    n_queries, query_tokens = columns.shape
    if columns.token_major:
        sides, token_axis = (query_tokens, n_queries), 2
    else:
        sides, token_axis = (n_queries, columns.filled), 3
    over_queries = scratch("over queries", (n_items, item_tokens, n_queries))
    over_items = scratch("over items", (n_items, *sides))
    for first, tile in zip(range(0, n_items, tile_items), tiles, strict=True):
        similarity = tile.view(-1, item_tokens, *sides)
        torch.amax(similarity, dim=token_axis, out=over_queries[first : first + tile_items])
        torch.amax(similarity, dim=1, out=over_items[first : first + tile_items])
    over_queries = F.leaky_relu_(over_queries, LEAKY_SLOPE).mean(dim=1)
    over_items = over_items.narrow(token_axis - 1, 0, query_tokens)
    return over_queries + F.leaky_relu_(over_items, LEAKY_SLOPE).mean(dim=token_axis - 1)


# Products ``rows [m, D] @ columns [D, w]`` in float32, ``[height, w]`` at a time, in memory that the next one overwrites.


class Scratch:
    """Memory shared by all blocks of a thread: fresh pages would cost more than the maxima."""

    def __init__(self) -> None:
        self._memory: dict[tuple[int, str], Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        key = get_ident(), name
        memory, elements = self._memory.get(key), math.prod(shape)
        if memory is None or memory.numel() < elements:
            memory = self._memory[key] = torch.empty(elements, dtype=dtype)
        return memory[:elements].view(*shape)


def _float32_tiles(rows: Tensor, columns: _Columns, height: int, scratch: Scratch) -> Iterator[Tensor]:
    if rows.dtype != torch.float32:
        rows = scratch("rows", rows.shape).copy_(rows)
    if cpu.suits_onednn(rows):
        product = cpu.linear(rows, columns.wide_packed)
    else:
        product = torch.mm(rows, columns.wide, out=scratch("product", (len(rows), len(columns.tokens))))
    yield from product.split(height)


def _rounded_tiles(rows: Tensor, columns: _Columns, height: int, scratch: Scratch) -> Iterator[Tensor]:
    if rows.dtype == torch.float16:  # PyTorch converts it to bfloat16 element by element
        rows = scratch("rows", rows.shape).copy_(rows)
    if rows.dtype != torch.bfloat16:
        rows = scratch("narrow", rows.shape, torch.bfloat16).copy_(rows)
    for part in cpu.linear(rows, columns.narrow_packed).split(height):
        yield scratch("wide", part.shape).copy_(part)  # maxima in float32 are faster


def _bfloat16_tiles(rows: Tensor, columns: Tensor, height: int, scratch: Scratch) -> Iterator[Tensor]:
    shape = len(rows), columns.shape[1]
    rounded = torch.mm(rows, columns, out=scratch("rounded", shape, torch.bfloat16))
    lost = torch.addmm(rounded, rows, columns, beta=-1, out=scratch("lost", shape, torch.bfloat16))
    for high, low in zip(rounded.split(height), lost.split(height), strict=True):
        # Converted separately: adding two dtypes would allocate fresh memory.
        tile = scratch("high", high.shape).copy_(high)
        yield tile.add_(scratch("low", low.shape).copy_(low))


def _bfloat16_pays(rows: Tensor, columns: Tensor) -> bool:
    if not rows.dtype == columns.dtype == torch.bfloat16:
        return False
    # Two products are faster than one in float32 only with matrix instructions, and only oneDNN uses those.
    work = len(rows) * columns.numel()
    return work >= _LEAST_BFLOAT16_WORK and cpu.has("amx_tile") and cpu.has_onednn()


def rounding_error(dtype: torch.dtype) -> float | None:
    """Largest error of rounded products of rows of norm 1; None if rounded products are not faster.

    Each rounding is off by at most ``2^-8``: that of the product, and those of both rows if they are not bfloat16 already. A
    small margin allows for products of the errors, and for rows slightly longer than 1.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16) or not cpu.has_bfloat16():
        return None
    return (1.01 if dtype == torch.bfloat16 else 3.05) * 2.0**-8


def _prepared_int8_tiles(
    rows: Tensor, columns: _Columns, row_scales: Tensor, height: int, scratch: Scratch
) -> Iterator[Tensor]:
    at_once = max(1, _rows_at_once(len(columns.tokens), rows.shape[1]) // height) * height
    for part, part_scales in zip(rows.split(at_once), row_scales.split(at_once), strict=True):
        # oneDNN would read the rows from memory in small pieces, at a fraction of the rate of a copy.
        product = columns.int8_product(scratch("rows", part.shape, torch.int8).copy_(part))
        for tile, scales in zip(product.split(height), part_scales.split(height), strict=True):
            yield tile.mul_(scales)


def _int8_tiles(
    rows: Tensor, columns: _Columns, row_scales: Tensor, column_scales: Tensor, height: int, scratch: Scratch
) -> Iterator[Tensor]:
    shape = len(rows), len(columns.tokens)
    if cpu.has_int8():
        product = torch._int_mm(rows, columns.transposed, out=scratch("integers", shape, torch.int32))  # pyright: ignore[reportPrivateImportUsage]
    else:  # integers below 2^24 are exact in float32
        product = torch.mm(scratch("rows", rows.shape).copy_(rows), columns.wide, out=scratch("product", shape))
    for part, scales in zip(product.split(height), row_scales.split(height), strict=True):
        yield scratch("scaled", part.shape).copy_(part).mul_(column_scales).mul_(scales)
