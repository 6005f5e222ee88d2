"""Late interaction as registered PyTorch operations: choice of the implementation, gradient, and :func:`clim_scores`.

The contract is in :mod:`finelip_fast.kernels.clim.formula`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from finelip_fast.errors import InputError
from finelip_fast.kernels import derivatives, dispatch
from finelip_fast.kernels.checks import check_alpha, check_floats, check_tensor
from finelip_fast.kernels.clim.formula import (
    MAX_GRADIENT_TOKENS,
    MAX_QUERY_TOKENS,
    clim_reference,
    clim_reference_in_blocks,
    scaled_rows,
)
from finelip_fast.kernels.clim.rows import Pieces
from finelip_fast.kernels.registration import fake, operation

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_QUANTISED = (torch.int8, torch.float8_e4m3fn)

# --- Registered operations -----------------------------------------------------------------------------------------


@operation("finelip::clim_scores")
def _scores(
    queries: Tensor, items: Tensor, query_scales: Tensor | None, item_scales: Tensor | None, alpha: float
) -> Tensor:
    implementation = dispatch.choose(queries.device, _limit(queries, items)).implementation
    scores: Callable[..., Tensor]
    if implementation == "triton":
        from finelip_fast.kernels.clim import triton

        scores = triton.scores
    elif implementation == "blocked" and queries.device.type == "cpu":
        from finelip_fast.kernels.clim import cpu

        scores = cpu.scores
    else:
        scores = clim_reference_in_blocks
    return scores(queries, items, alpha=alpha, query_scales=query_scales, item_scales=item_scales)


@fake("finelip::clim_scores")
def _(queries: Tensor, items: Tensor, query_scales: Tensor | None, item_scales: Tensor | None, alpha: float) -> Tensor:
    return queries.new_empty(queries.shape[0], items.shape[0], dtype=torch.float32)


@operation("finelip::clim_scores_with_winners")
def _scores_with_winners(queries: Tensor, items: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``[Q, N]``, and the winners of the maxima, ``[Q, N, L_q]`` and ``[Q, N, L_i]``; see ``gradient.py``."""
    module = _gradient_module(queries, items)
    outputs: tuple[Tensor, Tensor, Tensor] = module.scores_with_winners(queries, items, alpha=alpha)
    return outputs


@fake("finelip::clim_scores_with_winners")
def _(queries: Tensor, items: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    from finelip_fast.kernels.clim.gradient import winner_dtype

    (n_queries, query_tokens, _), (n_items, item_tokens, _) = queries.shape, items.shape
    return (
        queries.new_empty(n_queries, n_items, dtype=torch.float32),
        queries.new_empty(n_queries, n_items, query_tokens, dtype=winner_dtype(item_tokens)),
        queries.new_empty(n_queries, n_items, item_tokens, dtype=winner_dtype(query_tokens)),
    )


def _limit(queries: Tensor, items: Tensor) -> str:
    """Reason why the fused kernels cannot take these inputs; empty if they can."""
    if queries.shape[1] > MAX_QUERY_TOKENS:
        return f"late interaction's kernels take up to {MAX_QUERY_TOKENS} query tokens, not {queries.shape[1]}"
    if queries.dtype != items.dtype or queries.dtype not in (*_FLOATS, *_QUANTISED):
        return f"late interaction's kernels take one dtype of at most 32 bits, not {queries.dtype} and {items.dtype}"
    return ""


@operation("finelip::clim_gradient")
def _gradient(
    grad_scores: Tensor, queries: Tensor, items: Tensor, query_winners: Tensor, item_winners: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    module = _gradient_module(queries, items)
    gradients: tuple[Tensor, Tensor] = module.gradient(
        grad_scores, queries, items, query_winners, item_winners, alpha=alpha
    )
    return gradients


def _gradient_module(queries: Tensor, items: Tensor) -> Any:
    limit = _limit(queries, items)
    if max(queries.shape[1], items.shape[1]) > MAX_GRADIENT_TOKENS:
        limit = f"late interaction's gradient kernels take up to {MAX_GRADIENT_TOKENS} tokens"
    if dispatch.choose(queries.device, limit).implementation == "triton":
        from finelip_fast.kernels.clim import gradient_triton

        return gradient_triton
    from finelip_fast.kernels.clim import gradient

    return gradient


@fake("finelip::clim_gradient")
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
    if torch.is_grad_enabled() or derivatives.transformed():
        grad_queries, grad_items = derivatives.again(
            partial(clim_reference_in_blocks, alpha=ctx.alpha), grad_scores, queries, items
        )
    else:
        grad_queries, grad_items = _gradient(grad_scores, queries, items, *winners, ctx.alpha)
    return grad_queries, grad_items, None


torch.library.register_autograd("finelip::clim_scores_with_winners", _backward, setup_context=_keep_winners)


# --- Public function -----------------------------------------------------------------------------------------------


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
            with ``query_scales``, as returned by :func:`quantize`.
        items: Embeddings ``[N, L_i, D]``, quantised if the queries are. The fused kernels take float32, float16 and bfloat16,
            the same on both sides.
        alpha: Weight of the global cosine. 1 gives the cosine alone, 0 gives ``fine`` alone.
        query_scales, item_scales: float32 ``[Q, L_q]`` and ``[N, L_i]``: a row is its numbers times its scale.

    Returns:
        float32 ``[Q, N]``; products are accumulated in float32. Memory beyond inputs and result is bounded, to about 64 MiB
        on a CPU. Differentiable: gradients by autograd use the kernels and keep ``L_q + L_i`` bytes per pair for up to 128
        tokens. Second-order gradients, forward mode (``torch.func.jvp``), any transformation of ``torch.func``, and gradients
        of scales use the plain reference, which is slower; gradients of those keep ``L_q * L_i`` numbers per pair. The
        derivative of a maximum is that of its first winner.

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
    check_shapes(queries, items)
    _check_scales(queries, items, query_scales, item_scales)
    check_alpha(alpha)
    with torch.autocast(queries.device.type, enabled=False):
        if torch.compiler.is_exporting():  # other runtimes know only PyTorch's own operations
            return clim_reference(scaled_rows(queries, query_scales), scaled_rows(items, item_scales), alpha)
        if derivatives.transformed() or (torch.is_grad_enabled() and _any_requires_grad(query_scales, item_scales)):
            return clim_reference_in_blocks(
                queries, items, alpha=alpha, query_scales=query_scales, item_scales=item_scales
            )
        if torch.is_grad_enabled() and _any_requires_grad(queries, items):
            if 0 in (*queries.shape, *items.shape):
                return clim_reference(queries, items, alpha)
            scores: Tensor = _scores_with_winners(queries, items, alpha)[0]
            return scores
        result: Tensor = _scores(queries, items, query_scales, item_scales, alpha)
        return result


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def check_shapes(queries: Tensor, items: Tensor | Pieces) -> None:
    """
    Raises:
        InputError: The inputs are not two lists of matrices of the same width.
    """
    expected = "expected queries [Q, L_q, D] and items [N, L_i, D]"
    if queries.ndim != 3 or len(items.shape) != 3:
        raise InputError(f"{expected}, got {list(queries.shape)} and {list(items.shape)}")
    if queries.shape[2] != items.shape[2]:
        raise InputError(f"{expected} with equal D, got {queries.shape[2]} and {items.shape[2]}")


def _check_scales(queries: Tensor, items: Tensor, query_scales: Tensor | None, item_scales: Tensor | None) -> None:
    sides = ("queries", queries, query_scales), ("items", items, item_scales)
    quantised = {rows.dtype in _QUANTISED for _, rows, _ in sides}
    if len(quantised) > 1:
        raise InputError(
            f"expected both queries and items quantised or neither, got {queries.dtype} and {items.dtype}; see quantize"
        )
    for name, rows, scales in sides:
        if rows.dtype not in _QUANTISED:
            check_floats(name, rows)
        if scales is not None:
            check_tensor(f"scales of {name}", scales, rows.device)
        expected = rows.shape[:2] if rows.dtype in _QUANTISED else None
        got = None if scales is None else scales.shape
        if got != expected:
            argument = "query_scales" if name == "queries" else "item_scales"
            shape, remedy = (f" {list(expected)}", "use quantize") if expected else ("=None", "omit them")
            raise InputError(
                f"expected {argument}{shape} for {name} {list(rows.shape)} in {rows.dtype}, got "
                f"{None if got is None else list(got)}; {remedy}"
            )
        if scales is not None and scales.dtype != torch.float32:
            raise InputError(f"expected scales in float32 for {name}, got {scales.dtype}")
