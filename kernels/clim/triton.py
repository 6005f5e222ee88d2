"""Late interaction on the GPU: both directions of every pair in one pass over the items.

One program owns ``BLOCK_ITEMS`` items and ``QUERIES`` queries, and iterates over the item token ``j``. Each step is one
product, tiled over ``D``: token ``j`` of each item against every token of the queries, ``S [BLOCK_ITEMS, COLUMNS]``.

- item to query: the maximum over the columns of one query, then leaky ReLU, summed over ``j``;
- query to item: an elementwise running maximum of ``S``; leaky ReLU and the mean once, at the end;
- global cosine: the first column of each query at ``j = 0``.

So the items are read once, and neither ``L_i`` nor ``D`` is padded. A query takes ``L_q`` columns rounded up to a multiple of
8; the surplus repeats its last token, which changes no maximum and is left out of the mean. Contract and formula:
``formula.py``.

NaN: every entry of ``S`` passes through the running maximum, which keeps NaN, so NaN in an embedding gives NaN scores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from finelip_fast.errors import InputError, KernelError
from finelip_fast.kernels.clim.formula import LEAKY_SLOPE, MAX_QUERY_TOKENS
from finelip_fast.kernels.clim.launches import (
    GROUP,
    ClimSettings,
    Launch,
    describes,
    query_columns,
    settings_for,
    spread,
)

_GROUP = tl.constexpr(GROUP)
_SLOPE = tl.constexpr(LEAKY_SLOPE)

_ALIGNMENT = 16  # bytes, of a tensor descriptor's start and strides

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_QUANTISED = (torch.int8, torch.float8_e4m3fn)


@triton.jit
def leaky(x):
    return tl.where(x > 0, x, x * _SLOPE)


@triton.jit
def winner_byte(index, value):
    """Who won a maximum: 7 bits of index, and the high bit where leaky ReLU's slope applies."""
    return (index | tl.where(value > 0, 0, 128)).to(tl.uint8)


@triton.jit
def sum_by_query(x, owner, QUERIES: tl.constexpr, SLOTS: tl.constexpr):
    """``[ROWS, COLUMNS]`` to ``[ROWS, SLOTS]``: the sum over the columns of each query."""
    sums = tl.zeros([x.shape[0], SLOTS], tl.float32)
    for q in tl.static_range(QUERIES):
        own_sum = tl.sum(tl.where(owner[None, :] == q, x, 0.0), axis=1)
        sums = tl.where(tl.arange(0, SLOTS)[None, :] == q, own_sum[:, None], sums)
    return sums


@triton.jit
def query_columns_at(query_rows, live, first_column, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """A piece of ``D`` of the program's queries, ``[BLOCK_WIDTH, COLUMNS]``."""
    d = first_column + tl.arange(0, BLOCK_WIDTH)
    mask = live[None, :]
    if WIDTH % BLOCK_WIDTH != 0:
        mask = mask & (d < WIDTH)[:, None]
    return tl.load(query_rows[None, :] + d[:, None], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["n_queries", "n_items"])
def scores_kernel(
    queries,
    items,
    query_scales,
    item_scales,
    out,
    query_winners,
    item_winners,
    n_queries,
    n_items,
    alpha,
    query_stride,
    query_token_stride,
    item_stride,
    item_token_stride,
    QUERY_TOKENS: tl.constexpr,
    ITEM_TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    QUERY_COLUMNS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """Scales and winners are None where there are none; ``SLOTS`` is ``QUERIES`` as a power of two.

    ``items`` is a pointer, or with ``DESCRIPTOR`` a descriptor of all tokens of an item in a row, ``[N, L_i D]``.
    """
    # The queries vary fastest: programs that share their items run side by side and find them in the L2 cache.
    query_blocks = tl.cdiv(n_queries, QUERIES)
    first_query = tl.program_id(0) % query_blocks * QUERIES
    # 64 bits before any product: items may hold more than 2^31 numbers.
    first_item = tl.program_id(0) // query_blocks * BLOCK_ITEMS
    row = (tl.program_id(0) // query_blocks).to(tl.int64) * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)
    is_item = row < n_items
    item = tl.minimum(row, n_items - 1)  # past the end: the last item once more, never stored
    if not DESCRIPTOR:
        item_rows = items + item * item_stride
        token_step = tl.cast(item_token_stride, tl.int64)

    column = tl.arange(0, COLUMNS)
    owner = column // _GROUP // (QUERY_COLUMNS // _GROUP)  # which of the program's queries
    place = column - owner * QUERY_COLUMNS
    is_token = place < QUERY_TOKENS
    query = (first_query + owner).to(tl.int64)
    token = tl.minimum(place, QUERY_TOKENS - 1).to(tl.int64)
    live = (owner < QUERIES) & (query < n_queries)
    query_rows = queries + query * query_stride + token * query_token_stride
    if query_scales is not None:
        column_scale = tl.load(query_scales + query * QUERY_TOKENS + token, mask=live, other=0.0)
        # Loaded one token ahead, so that nothing waits for a scale.
        row_scale = tl.load(item_scales + item * ITEM_TOKENS)

    SUM_TYPE: tl.constexpr = tl.int32 if queries.dtype.element_ty == tl.int8 else tl.float32
    slot = tl.arange(0, SLOTS)[None, :]
    sums = tl.zeros([BLOCK_ITEMS, COLUMNS], SUM_TYPE)
    item_sum = tl.zeros([BLOCK_ITEMS, SLOTS], tl.float32)
    cosine = tl.zeros([BLOCK_ITEMS, SLOTS], tl.float32)
    best = tl.full([BLOCK_ITEMS, COLUMNS], float("-inf"), tl.float32)
    best_at = tl.zeros([BLOCK_ITEMS, COLUMNS], tl.int32)
    # One loop over tokens and pieces of D, so that one pipeline of loads runs through, from one token into the next.
    PIECES: tl.constexpr = (WIDTH + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    if PIECES == 1:  # once for all item tokens: it stays in shared memory
        whole_queries = query_columns_at(query_rows, live, 0, WIDTH, BLOCK_WIDTH)
    for step in range(ITEM_TOKENS * PIECES):
        j = step // PIECES
        first_column = step % PIECES * BLOCK_WIDTH
        query_piece = (
            whole_queries if PIECES == 1 else query_columns_at(query_rows, live, first_column, WIDTH, BLOCK_WIDTH)
        )
        if DESCRIPTOR:  # past the last item it gives zeros
            item_piece = items.load([first_item, j * WIDTH + first_column])
        else:
            d = first_column + tl.arange(0, BLOCK_WIDTH)
            item_at = item_rows[:, None] + (j * token_step + d)[None, :]
            if WIDTH % BLOCK_WIDTH == 0:
                item_piece = tl.load(item_at)
            else:
                item_piece = tl.load(item_at, mask=(d < WIDTH)[None, :], other=0.0)
        # Hopper adds float8 products up in fewer bits than float32: never past one piece (max_num_imprecise_acc).
        sums = tl.dot(
            item_piece, query_piece, sums, input_precision="ieee", max_num_imprecise_acc=BLOCK_WIDTH, out_dtype=SUM_TYPE
        )
        if step % PIECES == PIECES - 1:
            s = sums
            if query_scales is not None:
                s = sums.to(tl.float32) * row_scale[:, None] * column_scale[None, :]
                row_scale = tl.load(item_scales + item * ITEM_TOKENS + tl.minimum(j + 1, ITEM_TOKENS - 1))
            if query_winners is not None:
                best_at = tl.where(s > best, j, best_at)  # strictly: the first of equals wins
            best = tl.maximum(best, s, propagate_nan=tl.PropagateNan.ALL)
            for q in tl.static_range(QUERIES):
                own_scores = tl.where(owner[None, :] == q, s, float("-inf"))
                if item_winners is None:
                    met = tl.max(own_scores, axis=1)
                else:
                    met, met_at = tl.max(own_scores, axis=1, return_indices=True)
                    # Clamped to the query: next to NaN, any column may come out.
                    met_at = tl.minimum(tl.maximum(met_at - q * QUERY_COLUMNS, 0), QUERY_TOKENS - 1)
                    pair = (first_query + q).to(tl.int64) * n_items + row
                    is_pair = row < tl.where(first_query + q < n_queries, n_items, 0)
                    tl.store(item_winners + pair * ITEM_TOKENS + j, winner_byte(met_at, met), mask=is_pair)
                item_sum += tl.where(slot == q, leaky(met)[:, None], 0.0)
            first = sum_by_query(tl.where(place[None, :] == 0, s, 0.0), owner, QUERIES, SLOTS)
            cosine = tl.where(j == 0, first, cosine)
            sums = tl.zeros([BLOCK_ITEMS, COLUMNS], SUM_TYPE)

    query_sum = sum_by_query(tl.where(is_token[None, :], leaky(best), 0.0), owner, QUERIES, SLOTS)
    score = alpha * cosine + (1.0 - alpha) * (item_sum / ITEM_TOKENS + query_sum / QUERY_TOKENS)
    out_query = (first_query + slot).to(tl.int64)
    stored = is_item[:, None] & (slot < QUERIES) & (out_query < n_queries)
    tl.store(out + out_query * n_items + row[:, None], score, mask=stored)
    if query_winners is not None:
        at = (query[None, :] * n_items + row[:, None]) * QUERY_TOKENS + place[None, :]
        stored = is_item[:, None] & (live & is_token)[None, :]
        tl.store(query_winners + at, winner_byte(best_at, best), mask=stored)


INTERPRETED = not isinstance(scores_kernel, triton.JITFunction)


def scores(
    queries: Tensor,
    items: Tensor,
    *,
    alpha: float,
    query_scales: Tensor | None = None,
    item_scales: Tensor | None = None,
    settings: ClimSettings | None = None,
) -> Tensor:
    """Score every query against every item; formula in ``formula.py``.

    Args:
        queries: ``[Q, L_q, D]``, ``L_q`` up to 256; float32, float16, bfloat16, or int8 / float8_e4m3fn with scales.
        items: ``[N, L_i, D]`` in the same dtype. Any strides; copied only if the last one is not 1.
        alpha: Weight of the global cosine.
        query_scales: float32 ``[Q, L_q]``: row ``l`` of query ``q`` is ``queries[q, l] * query_scales[q, l]``.
        item_scales: float32 ``[N, L_i]``.
        settings: Launch settings; None means :func:`~finelip_fast.kernels.clim.launches.settings_for`.

    Returns:
        float32 ``[Q, N]``. Not differentiable. float32 inputs are multiplied in full float32.

    Raises:
        InputError: Shapes, dtypes or scales that do not fit together, or too many query tokens.
        KernelError: No GPU, or one below compute capability 8.0 (8.9 for float8).
    """
    capability = check_inputs(queries, items, MAX_QUERY_TOKENS)
    _check_scales(queries, items, query_scales, item_scales, capability)
    out = torch.empty(queries.shape[0], items.shape[0], dtype=torch.float32, device=queries.device)
    if is_nothing(queries, items):
        return out.zero_()
    if query_scales is not None and item_scales is not None:
        query_scales, item_scales = query_scales.contiguous(), item_scales.contiguous()
    launch(queries, items, out, alpha, capability, settings, scales=(query_scales, item_scales))
    return out


def is_nothing(queries: Tensor, items: Tensor) -> bool:
    """Whether there is nothing to multiply, so that all scores are 0."""
    return queries.numel() == 0 or items.numel() == 0


def launch(
    queries: Tensor,
    items: Tensor,
    out: Tensor,
    alpha: float,
    capability: int,
    settings: ClimSettings | None,
    *,
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
    winners: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """Fill `out`, and the winners if given; the inputs have been checked and are not empty."""
    (n_queries, query_tokens, width), (n_items, item_tokens, _) = queries.shape, items.shape
    if settings is None:
        has_winners = winners[0] is not None
        case = Launch(capability, queries.dtype, width, n_queries, query_tokens, has_winners)
        settings = spread(settings_for(case), n_queries, n_items)
    queries, items = readable(queries), readable(items)
    descriptor = None
    if settings.descriptor and describes(settings, capability, width):
        descriptor = described(items, settings)
    per_program = settings.queries_per_program
    grid = (triton.cdiv(n_items, settings.block_items) * triton.cdiv(n_queries, per_program),)
    with torch.cuda.device_of(queries):
        scores_kernel[grid](
            queries,
            items if descriptor is None else descriptor,
            *scales,
            out,
            *winners,
            n_queries,
            n_items,
            float(alpha),
            *queries.stride()[:2],
            *items.stride()[:2],
            QUERY_TOKENS=query_tokens,
            ITEM_TOKENS=item_tokens,
            WIDTH=width,
            QUERIES=per_program,
            QUERY_COLUMNS=query_columns(query_tokens),
            COLUMNS=settings.columns(query_tokens),
            SLOTS=triton.next_power_of_2(per_program),
            BLOCK_ITEMS=settings.block_items,
            BLOCK_WIDTH=settings.block_width,
            DESCRIPTOR=descriptor is not None,
            num_warps=settings.num_warps,
            num_stages=settings.num_stages,
            enable_fp_fusion=True,  # explicit, because Triton 3.9 warns if it is omitted
        )


def described(items: Tensor, settings: ClimSettings) -> TensorDescriptor | None:
    """``[N, L_i, D]`` as ``[N, L_i D]``, for the GPU's asynchronous copy unit; None if the strides do not allow it."""
    n_items, tokens, width = items.shape
    item_stride, token_stride, _ = items.stride()
    if token_stride != width or item_stride < tokens * width or item_stride * items.itemsize % _ALIGNMENT:
        return None
    if items.data_ptr() % _ALIGNMENT:
        return None
    block = [settings.block_items, settings.block_width]
    return TensorDescriptor(items, [n_items, tokens * width], [item_stride, 1], block)


def readable(rows: Tensor) -> Tensor:
    """`rows` as the kernels read them, with the numbers of a row contiguous."""
    if INTERPRETED and rows.dtype == torch.bfloat16:
        rows = rows.float()  # Triton's interpreter has no bfloat16 products
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def check_inputs(queries: Tensor, items: Tensor, max_query_tokens: int) -> int:
    """Check the inputs and return the GPU's compute capability, 80 for 8.0; raises the errors of :func:`scores`."""
    if queries.dim() != 3 or items.dim() != 3 or queries.shape[2] != items.shape[2]:
        raise InputError(
            f"expected queries [Q, L_q, D] and items [N, L_i, D], got {list(queries.shape)} and {list(items.shape)}"
        )
    if queries.dtype != items.dtype or queries.device != items.device:
        raise InputError(
            "expected queries and items of one dtype on one device, "
            f"got {queries.dtype} on {queries.device} and {items.dtype} on {items.device}: convert one of them"
        )
    if queries.shape[1] > max_query_tokens:
        raise InputError(
            f"expected at most {max_query_tokens} query tokens, got {queries.shape[1]}: use finelip_fast.kernels.clim_scores"
        )
    if INTERPRETED:
        return 90
    if not queries.is_cuda:
        raise KernelError(
            f"expected tensors on a CUDA device, got {queries.device}: use finelip_fast.kernels.clim_scores"
        )
    major, minor = torch.cuda.get_device_capability(queries.device)
    if major < 8:
        raise KernelError(f"expected a GPU of compute capability 8.0 or more, got {major}.{minor}")
    return 10 * major + minor


def _check_scales(
    queries: Tensor, items: Tensor, query_scales: Tensor | None, item_scales: Tensor | None, capability: int
) -> None:
    if queries.dtype in FLOATS:
        if query_scales is not None or item_scales is not None:
            raise InputError(f"expected scales for int8 or float8_e4m3fn embeddings only, got {queries.dtype}")
        return
    if queries.dtype not in _QUANTISED:
        raise InputError(
            f"expected float32, float16, bfloat16, int8 or float8_e4m3fn embeddings, got {queries.dtype}: convert them"
        )
    if queries.dtype == torch.float8_e4m3fn and capability < 89:
        raise KernelError("expected a GPU of compute capability 8.9 or more for float8_e4m3fn: use int8")
    for name, rows, scales in (("query_scales", queries, query_scales), ("item_scales", items, item_scales)):
        if scales is None or scales.shape != rows.shape[:2] or scales.dtype != torch.float32:
            got = "None" if scales is None else f"{scales.dtype} {list(scales.shape)}"
            raise InputError(f"expected {name} float32 {list(rows.shape[:2])} for {rows.dtype} embeddings, got {got}")
