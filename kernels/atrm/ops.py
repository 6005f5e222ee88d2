"""Token aggregation as registered PyTorch operations: choice of the implementation, gradient, and :func:`atrm`.

The contract is in :mod:`finelip_fast.kernels.atrm.formula`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finelip_fast.errors import InputError
from finelip_fast.kernels import cpu, derivatives, dispatch
from finelip_fast.kernels.atrm.formula import MAX_AGGREGATED, MAX_WIDTH, AtrmInputs, atrm_reference
from finelip_fast.kernels.checks import check_counts, check_floats
from finelip_fast.kernels.registration import fake, operation

# Elements of x that one block on the CPU holds, 16 MiB in float32.
_BLOCK_ELEMENTS = 1 << 22


def _in_blocks(inputs: AtrmInputs) -> Tensor:
    """Run the reference on a few items at a time, up to their longest length: intermediate results stay in the cache."""
    x, lengths = inputs.x, inputs.lengths
    at_once = max(1, _BLOCK_ELEMENTS // max(1, x.shape[1] * x.shape[2]))
    blocks = []
    for first in range(0, max(1, len(x)), at_once):
        rows = slice(first, first + at_once)
        some_lengths = None if lengths is None else lengths[rows]
        longest = x.shape[1] if some_lengths is None or not len(some_lengths) else int(some_lengths.amax())
        block = inputs._replace(x=x[rows, :longest], lengths=some_lengths, anchor=inputs.anchor[rows])
        blocks.append(atrm_reference(block, layer=cpu.layer))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


# --- Registered operations -----------------------------------------------------------------------------------------

# The inputs in the schemas of the operations.
_INPUTS = ", ".join("Tensor? lengths" if name == "lengths" else f"Tensor {name}" for name in AtrmInputs._fields)


@operation("finelip::atrm", f"({_INPUTS}) -> Tensor")
def _atrm(*tensors: Any) -> Tensor:
    inputs = AtrmInputs(*tensors)
    implementation = _choose(inputs)
    if implementation == "triton":
        from finelip_fast.kernels.atrm import triton

        return triton.aggregate(inputs)
    if implementation == "blocked" and inputs.x.device.type == "cpu":
        return _in_blocks(inputs)
    return atrm_reference(inputs)


@fake("finelip::atrm")
def _(*tensors: Any) -> Tensor:
    inputs = AtrmInputs(*tensors)
    return inputs.x.new_empty(inputs.x.shape[0], inputs.w2.shape[0] + 1, inputs.x.shape[2])


@operation("finelip::atrm_gradient", f"(Tensor grad_out, {_INPUTS}) -> ({', '.join(['Tensor'] * 9)})")
def _gradient(grad_out: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    """Gradients of the inputs in their order, without ``lengths``."""
    inputs = AtrmInputs(*tensors)
    if _choose(inputs) == "triton":
        from finelip_fast.kernels.atrm import gradient_triton

        return gradient_triton.gradient(grad_out, inputs)
    from finelip_fast.kernels.atrm import gradient

    return gradient.gradient(grad_out, inputs)


@fake("finelip::atrm_gradient")
def _(grad_out: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    x, *parameters, _lengths, anchor = tensors
    return x.new_empty(x.shape), *map(torch.empty_like, parameters), anchor.new_empty(anchor.shape)


def _choose(inputs: AtrmInputs) -> str:
    x, w2, limit = inputs.x, inputs.w2, ""
    if x.shape[2] > MAX_WIDTH or w2.shape[0] > MAX_AGGREGATED:
        limit = (
            f"token aggregation's kernels take D up to {MAX_WIDTH} and K up to {MAX_AGGREGATED}, "
            f"not D = {x.shape[2]}, K = {w2.shape[0]}"
        )
    elif x.dtype.itemsize > 4:
        limit = f"token aggregation's kernels take numbers of at most 32 bits, not {x.dtype}"
    return dispatch.choose(x.device, limit).implementation


# --- Gradient ------------------------------------------------------------------------------------------------------


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    inputs = AtrmInputs(*ctx.saved_tensors)
    if torch.is_grad_enabled() or derivatives.transformed():

        def reference(anchor: Tensor, *tensors: Tensor) -> Tensor:
            return atrm_reference(AtrmInputs._make((*tensors, inputs.lengths, anchor)))

        grad_anchor, *grads = derivatives.again(reference, grad_out, inputs.anchor, *inputs[:8])
    else:
        *grads, grad_anchor = _gradient(grad_out, *inputs)
    return *grads, None, grad_anchor


torch.library.register_autograd("finelip::atrm", _backward, setup_context=_keep_inputs)


# --- Public function -----------------------------------------------------------------------------------------------


def atrm(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    scale: Tensor,
    *,
    lengths: Tensor | None = None,
    anchor: Tensor,
) -> Tensor:
    """Aggregate the tokens of each item and put its anchor in front.

    Args:
        x: Token features ``[B, N, D]`` in float32, float16 or bfloat16, ``D`` at least 1, without CLS or EOT.
        norm_weight, norm_bias: LayerNorm parameters ``[D]``.
        w1, b1: First linear layer ``[h, D]``, ``[h]``.
        w2, b2: Second linear layer ``[K, h]``, ``[K]``.
        scale: Learned scalar, any shape of one element.
        lengths: Number of valid tokens of each item ``[B]``, integers in ``0..N``; None means all ``N``. A length below 0
            counts as 0, one above ``N`` as ``N``. Tokens at and after the length are never read. An item of length 0 has zero
            rows after its anchor.
        anchor: CLS or EOT features ``[B, D]``; row 0 of the result.

    Returns:
        ``[B, K + 1, D]`` in ``x``'s dtype, every row of unit length (a zero row stays zero); computed in float32.
        Differentiable: gradients by autograd use the kernels; second-order gradients, forward mode (``torch.func.jvp``) and
        any transformation of ``torch.func`` use the plain reference.

    Raises:
        InputError: Shapes, dtypes or devices that do not fit together.

    Example:
        >>> one = torch.ones
        >>> x = torch.tensor([[[3.0, 4.0]]])
        >>> atrm(x, one(2), one(2), one(1, 2), one(1), one(1, 1), one(1), one(1), anchor=x[:, 0])
        tensor([[[0.6000, 0.8000],
                 [0.6000, 0.8000]]])
    """
    parameters = {"norm_weight": norm_weight, "norm_bias": norm_bias, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    check_floats("x", x)
    device = x.device
    for name, tensor in (*parameters.items(), ("scale", scale), ("anchor", anchor)):
        check_floats(name, tensor, device)
    if x.dim() != 3 or anchor.shape != (x.shape[0], x.shape[2]):
        raise InputError(f"expected x [B, N, D] and anchor [B, D], got {tuple(x.shape)} and {tuple(anchor.shape)}")
    width, hidden, aggregated = x.shape[2], w1.shape[:1].numel(), w2.shape[:1].numel()
    if 0 in (width, hidden):
        raise InputError(f"expected D and h of at least 1, got x {list(x.shape)} and w1 {list(w1.shape)}")
    expected = {"norm_weight": (width,), "norm_bias": (width,), "w1": (hidden, width), "b1": (hidden,)}
    expected |= {"w2": (aggregated, hidden), "b2": (aggregated,)}
    for name, shape in expected.items():
        if parameters[name].shape != shape:
            raise InputError(
                f"expected {name} of shape {list(shape)} for x {list(x.shape)}, got {list(parameters[name].shape)}"
            )
    if scale.numel() != 1:
        raise InputError(f"expected scale to have one element, got {list(scale.shape)}")
    if lengths is not None:
        check_counts("lengths", lengths, x.device)
        if lengths.shape != x.shape[:1]:
            raise InputError(f"expected lengths [{x.shape[0]}], got {list(lengths.shape)}")
    # An exported graph consists of PyTorch's own operations, because other runtimes know no others.
    plain = torch.compiler.is_exporting() or derivatives.transformed()
    inputs = AtrmInputs(x, norm_weight, norm_bias, w1, b1, w2, b2, scale, lengths, anchor)
    with torch.autocast(x.device.type, enabled=False):
        return atrm_reference(inputs) if plain else _atrm(*inputs)
