"""Late interaction (CLIM): the score of two sets of unit rows, compared in both directions.

For the rows ``A [L_q, D]`` of a query and ``B [L_i, D]`` of an item (FineLIP, arXiv 2504.01916, section 3)::

    S     = leaky_relu(A @ B.T, 0.1)                                  [L_q, L_i]
    fine  = mean over rows (max over columns) + mean over columns (max over rows)      in [-0.2, 2]
    score = alpha * (A[0] . B[0]) + (1 - alpha) * fine

Row 0 is the global embedding (CLS or EOT). Leaky ReLU is monotonic, so it is applied to the maxima only. The score is
symmetric: swapping query and item changes nothing. An empty set of rows scores 0. NaN in an embedding gives NaN scores,
and :func:`clim_topk` ranks those last.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finelip_fast.errors import InputError
from finelip_fast.kernels import _derivatives, _dispatch
from finelip_fast.kernels._checks import check_alpha, check_floats, check_tensor
from finelip_fast.kernels._quantize import QuantizedItems
from finelip_fast.kernels._rows import Dequantized, Pieces, Rows

LEAKY_SLOPE = 0.1

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_QUANTISED = (torch.int8, torch.float8_e4m3fn)

# What the fused kernels take: columns of a tile, and the bits of a winner.
MAX_QUERY_TOKENS, MAX_GRADIENT_TOKENS = 256, 128

# Elements of the similarity tile that one block may hold: 64 MiB in float32.
TILE_ELEMENTS = 1 << 24


# --- Reference -----------------------------------------------------------------------------------------------------


def clim_reference(queries: Tensor, items: Tensor, alpha: float) -> Tensor:
    """The operation in plain PyTorch, in float32 whatever the inputs, all of ``S`` at once; shapes as :func:`clim_scores`."""
    n_queries, n_items = queries.shape[0], items.shape[0]
    if queries.shape[1] == 0 or items.shape[1] == 0:
        return torch.zeros(n_queries, n_items, device=queries.device)
    queries, items = queries.float(), items.float()
    similarity = (queries.flatten(0, 1) @ items.flatten(0, 1).T).view(
        n_queries, queries.shape[1], n_items, items.shape[1]
    )
    # max(dim).values sends the gradient of a tie to one winner, amax would split it.
    over_items = F.leaky_relu(similarity.max(dim=3).values, LEAKY_SLOPE).mean(dim=1)  # [Q, N]
    over_queries = F.leaky_relu(similarity.max(dim=1).values, LEAKY_SLOPE).mean(dim=2)  # [Q, N]
    return alpha * similarity[:, 0, :, 0] + (1 - alpha) * (over_items + over_queries)


# --- Registered operations -----------------------------------------------------------------------------------------


@torch.library.custom_op("finelip::clim_scores", mutates_args=())
def _scores(
    queries: Tensor, items: Tensor, query_scales: Tensor | None, item_scales: Tensor | None, alpha: float
) -> Tensor:
    implementation = _dispatch.choose(queries.device, _limit(queries, items)).implementation
    if implementation == "triton":
        from finelip_fast.kernels._clim_triton import scores
    elif implementation == "blocked" and queries.device.type == "cpu":
        from finelip_fast.kernels._clim_cpu import scores
    else:
        scores = _reference_in_blocks
    return scores(queries, items, alpha=alpha, query_scales=query_scales, item_scales=item_scales)


@_scores.register_fake
def _(queries: Tensor, items: Tensor, query_scales: Tensor | None, item_scales: Tensor | None, alpha: float) -> Tensor:
    return queries.new_empty(queries.shape[0], items.shape[0], dtype=torch.float32)


@torch.library.custom_op("finelip::clim_scores_with_winners", mutates_args=())
def _scores_with_winners(queries: Tensor, items: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``[Q, N]``, and who won each maximum: ``[Q, N, L_q]`` and ``[Q, N, L_i]``; see ``_clim_gradient.py``."""
    return _gradient_module(queries, items).scores_with_winners(queries, items, alpha=alpha)


@_scores_with_winners.register_fake
def _(queries: Tensor, items: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    from finelip_fast.kernels._clim_gradient import winner_dtype

    (n_queries, query_tokens, _), (n_items, item_tokens, _) = queries.shape, items.shape
    return (
        queries.new_empty(n_queries, n_items, dtype=torch.float32),
        queries.new_empty(n_queries, n_items, query_tokens, dtype=winner_dtype(item_tokens)),
        queries.new_empty(n_queries, n_items, item_tokens, dtype=winner_dtype(query_tokens)),
    )


def _reference_in_blocks(
    queries: Tensor,
    items: Tensor,
    *,
    alpha: float,
    query_scales: Tensor | None = None,
    item_scales: Tensor | None = None,
) -> Tensor:
    queries, items = _rows(queries, query_scales), _rows(items, item_scales)
    per_pair = max(1, queries.shape[1] * items.shape[1])
    block_items = max(1, min(items.shape[0], TILE_ELEMENTS // per_pair))
    block_queries = max(1, min(queries.shape[0], TILE_ELEMENTS // (per_pair * block_items)))
    rows = [
        torch.cat([clim_reference(some_queries, some, alpha) for some in items.split(block_items)], dim=1)
        for some_queries in queries.split(block_queries)
    ]
    return torch.cat(rows)


def _rows(values: Tensor, scales: Tensor | None) -> Tensor:
    """What numbers with scales stand for."""
    return values if scales is None else values.float() * scales[..., None]


def _limit(queries: Tensor, items: Tensor) -> str:
    """Why the fused kernels cannot take these; empty: they can."""
    if queries.shape[1] > MAX_QUERY_TOKENS:
        return f"late interaction's kernels take up to {MAX_QUERY_TOKENS} query tokens, not {queries.shape[1]}"
    if queries.dtype != items.dtype or queries.dtype not in (*_FLOATS, *_QUANTISED):
        return f"late interaction's kernels take one dtype of at most 32 bits, not {queries.dtype} and {items.dtype}"
    return ""


@torch.library.custom_op("finelip::clim_gradient", mutates_args=())
def _gradient(
    grad_scores: Tensor, queries: Tensor, items: Tensor, query_winners: Tensor, item_winners: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    module = _gradient_module(queries, items)
    return module.gradient(grad_scores, queries, items, query_winners, item_winners, alpha=alpha)


def _gradient_module(queries: Tensor, items: Tensor) -> Any:
    limit = _limit(queries, items)
    if max(queries.shape[1], items.shape[1]) > MAX_GRADIENT_TOKENS:
        limit = f"late interaction's gradient kernels take up to {MAX_GRADIENT_TOKENS} tokens"
    if _dispatch.choose(queries.device, limit).implementation == "triton":
        from finelip_fast.kernels import _clim_gradient_triton

        return _clim_gradient_triton
    from finelip_fast.kernels import _clim_gradient

    return _clim_gradient


@_gradient.register_fake
def _(
    grad_scores: Tensor, queries: Tensor, items: Tensor, query_winners: Tensor, item_winners: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape), items.new_empty(items.shape)


# --- Gradient ------------------------------------------------------------------------------------------------------


def _keep_winners(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, items, ctx.alpha = inputs
    _, query_winners, item_winners = output
    ctx.mark_non_differentiable(query_winners, item_winners)
    ctx.save_for_backward(queries, items, query_winners, item_winners)


def _backward(ctx: Any, grad_scores: Tensor, *_: Any) -> tuple[Tensor, Tensor, None]:
    queries, items, *winners = ctx.saved_tensors
    if torch.is_grad_enabled() or _derivatives.transformed():
        grad_queries, grad_items = _derivatives.again(
            partial(_reference_in_blocks, alpha=ctx.alpha), grad_scores, queries, items
        )
    else:
        grad_queries, grad_items = _gradient(grad_scores, queries, items, *winners, ctx.alpha)
    return grad_queries, grad_items, None


_scores_with_winners.register_autograd(_backward, setup_context=_keep_winners)


# --- Public functions ----------------------------------------------------------------------------------------------


def clim_scores(
    queries: Tensor,
    items: Tensor,
    *,
    alpha: float = 0.8,
    query_scales: Tensor | None = None,
    item_scales: Tensor | None = None,
) -> Tensor:
    """Score every query against every item.

    Args:
        queries: Embeddings ``[Q, L_q, D]``, unit rows, of any float dtype; or int8 (float8_e4m3fn on GPUs that multiply it)
            with ``query_scales``, as :func:`quantize` makes them.
        items: Embeddings ``[N, L_i, D]``, quantised where the queries are. The fused kernels take float32, float16 and
            bfloat16, the same on both sides.
        alpha: Weight of the global cosine. 1 gives the cosine alone, 0 gives ``fine`` alone.
        query_scales, item_scales: float32 ``[Q, L_q]`` and ``[N, L_i]``: a row is its numbers times its scale.

    Returns:
        float32 ``[Q, N]``; products are accumulated in float32. Memory beside inputs and result is bounded, to about 64 MiB
        on a CPU. Differentiable: a gradient by autograd is the kernels' and keeps ``L_q + L_i`` bytes a pair for up to 128
        tokens; a gradient's gradient, forward mode (``torch.func.jvp``), any transformation of ``torch.func``, and gradients
        of scales are the plain reference's, slower, and gradients of those keep ``L_q * L_i`` numbers a pair. A maximum's
        derivative is its first winner's.

    Raises:
        InputError: Shapes, dtypes, devices or scales that do not fit together, or an alpha outside [0, 1].
        KernelError: ``FINELIP_KERNELS=triton`` where the fused kernels cannot run.

    Example:
        >>> a = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> b = torch.tensor([[[1.0, 0.0]]])
        >>> clim_scores(a, b, alpha=0.0)  # mean(1, 0) + 1
        tensor([[1.5000]])
    """
    check_tensor("queries", queries)
    check_tensor("items", items, queries.device)
    _check(queries, items)
    _check_scales(queries, items, query_scales, item_scales)
    check_alpha(alpha)
    with torch.autocast(queries.device.type, enabled=False):
        if torch.compiler.is_exporting():  # other runtimes know PyTorch's own operations alone
            return clim_reference(_rows(queries, query_scales), _rows(items, item_scales), alpha)
        if _derivatives.transformed() or (torch.is_grad_enabled() and _any_requires_grad(query_scales, item_scales)):
            return _reference_in_blocks(queries, items, alpha=alpha, query_scales=query_scales, item_scales=item_scales)
        if torch.is_grad_enabled() and _any_requires_grad(queries, items):
            if 0 in (*queries.shape, *items.shape):
                return clim_reference(queries, items, alpha)
            scores: Tensor = _scores_with_winners(queries, items, alpha)[0]
            return scores
        result: Tensor = _scores(queries, items, query_scales, item_scales, alpha)
        return result


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def clim_topk(
    queries: Tensor, items: Rows, k: int, *, alpha: float = 0.8, among: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The ``k`` best items of each query, exactly.

    A first pass scores all items and knows how far rounding can have moved each score; the few items that may be among the
    best are scored again in float64. So neither the device nor the precision of the pass changes the result.

    Args:
        queries: Embeddings ``[Q, L_q, D]``, unit rows.
        items: ``[N, L_i, D]``, unit rows too, on the device of the queries, in host memory, or mapped from a file
            (``numpy.memmap``): what is not on the device goes there in chunks, on a GPU while the chunk before is scored.
            Or a sequence of such pieces ``[n_i, L_i, D]``, one after another, of one dtype and device.
        k: How many; more than there are is taken as all.
        alpha: As :func:`clim_scores`.
        among: int64 ``[n]``, ascending, each once, on any device: search these items alone, and read no other; None: all.

    Returns:
        ``(scores [Q, k], indices [Q, k])``, float32 and int64, best first, ties by lower index, NaN last. Indices count the
        items of all pieces, also those not in ``among``.

    Raises:
        InputError: Shapes, dtypes or pieces that do not fit together, ``among`` that is not as above, ``k < 1``, an alpha
            outside [0, 1], or a best item whose rows are longer than 1.
        KernelError: Under ``torch.func`` or in forward mode: a search has no derivative. What it finds for tensors that
            require a gradient requires none; :func:`clim_scores` of the items found does.
    """
    pieces = Pieces(items)
    _check_search("clim_topk", queries, items, pieces, alpha)
    from finelip_fast.kernels._topk import topk

    search = partial(topk, queries, pieces, k, alpha=alpha, score=clim_scores, among=among)
    with torch.no_grad():
        error = _rounding_error(queries, pieces.dtype)
        if error is not None:
            from finelip_fast.kernels._clim_cpu import scores

            return search(coarse=partial(scores, rounded=True), product_error=error)
        return search()


def _rounding_error(queries: Tensor, dtype: torch.dtype) -> float | None:
    """What a first pass of rounded products may be off by, where it makes a search faster."""
    if _dispatch.choose(queries.device).implementation != "blocked" or queries.device.type != "cpu":
        return None
    from finelip_fast.kernels._clim_cpu import rounding_error

    return rounding_error(queries.dtype) if queries.dtype == dtype else None


def clim_topk_int8(
    queries: Tensor,
    items: Rows | None,
    quantized: QuantizedItems,
    k: int,
    *,
    alpha: float = 0.8,
    among: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result of :func:`clim_topk`, found by a pass over int8 and full precision for the few items that it leaves.

    Args:
        queries, items, k, alpha, among: As :func:`clim_topk`; of ``items`` only the few rescored ones are read. Where
            int8 leaves more than an eighth of a chunk open, all of the chunk is read and scored in float32 first. None: there
            is nothing more exact than ``quantized``, whose anchors and integers times scales are the items.
        quantized: :func:`quantize_items` of ``items``; each field whole, or in pieces as suits it.

    Returns:
        ``(scores [Q, k], indices [Q, k], rescored [Q])``; the last counts the items that were scored again in float64.

    Raises:
        InputError, KernelError: As :func:`clim_topk`.
    """
    if not isinstance(quantized, QuantizedItems):
        raise InputError(f"expected quantized as QuantizedItems, got {type(quantized).__name__}; see quantize_items")
    pieces = Dequantized(quantized.values, quantized.scales, quantized.anchors) if items is None else Pieces(items)
    _check_search("clim_topk_int8", queries, items, pieces, alpha)
    from finelip_fast.kernels._topk import exact_topk_int8

    with torch.no_grad():
        return exact_topk_int8(queries, pieces, quantized, k, alpha=alpha, score=clim_scores, among=among)


def _check_search(name: str, queries: Tensor, items: Rows | None, pieces: Pieces, alpha: float) -> None:
    _derivatives.refuse(name, "take clim_scores of the items that it finds", queries, items)
    check_floats("queries", queries)
    if not pieces.dtype.is_floating_point:
        raise InputError(f"expected items in a float dtype, got {pieces.dtype}: convert them")
    _check(queries, pieces)
    check_alpha(alpha)


def _check(queries: Tensor, items: Tensor | Pieces) -> None:
    if queries.ndim != 3 or len(items.shape) != 3 or queries.shape[2] != items.shape[2]:
        raise InputError(
            f"expected queries [Q, L_q, D] and items [N, L_i, D], got {list(queries.shape)} and {list(items.shape)}"
        )


def _check_scales(queries: Tensor, items: Tensor, query_scales: Tensor | None, item_scales: Tensor | None) -> None:
    given = ("queries", queries, query_scales), ("items", items, item_scales)
    quantised = {rows.dtype in _QUANTISED for _, rows, _ in given}
    if len(quantised) > 1:
        raise InputError(
            f"expected both sides quantised or neither, got {queries.dtype} and {items.dtype}; see quantize"
        )
    for name, rows, scales in given:
        if rows.dtype not in _QUANTISED:
            check_floats(name, rows)
        if scales is not None:
            check_tensor(f"scales of {name}", scales, rows.device)
        expected = rows.shape[:2] if rows.dtype in _QUANTISED else None
        got = None if scales is None else scales.shape
        if got != expected:
            raise InputError(f"expected scales {expected} for {name} {list(rows.shape)} in {rows.dtype}, got {got}")
        if scales is not None and scales.dtype != torch.float32:
            raise InputError(f"expected scales in float32 for {name}, got {scales.dtype}")
