"""The gradient of token aggregation in plain PyTorch, and how the operation is registered."""

from __future__ import annotations

import pytest
import torch

from finelip_fast.kernels import atrm as operation
from finelip_fast.kernels.atrm.formula import AtrmInputs, atrm_reference


@pytest.fixture(scope="module")
def module():
    """`kernels/atrm/ops.py`: the package's name for it is the function."""
    import importlib

    return importlib.import_module("finelip_fast.kernels.atrm.ops")


def inputs(*, lengths=(0, 3, 7), scale=()):
    """Three items of seven tokens, ``D = 16, h = 5, K = 4``; the arguments of the reference, in order."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 7, 16), (16,), (16,), (5, 16), (5,), (4, 5), (4,), scale, (3, 16))
    *tensors, anchor = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    return [*tensors, None if lengths is None else torch.tensor(lengths), anchor]


def call(arguments):
    *tensors, lengths, anchor = arguments
    return operation(*tensors, lengths=lengths, anchor=anchor)


def gradients(function, arguments, grad):
    leaves = [tensor for tensor in arguments if tensor is not None and tensor.is_floating_point()]
    return torch.autograd.grad(function(arguments), leaves, grad)


def doubled(arguments):
    return [
        tensor.detach().double().requires_grad_() if tensor is not None and tensor.is_floating_point() else tensor
        for tensor in arguments
    ]


def exact(arguments, grad):
    """Gradients by autograd of the reference in float64."""
    reference = lambda arguments: atrm_reference(AtrmInputs(*arguments), dtype=torch.float64)  # noqa: E731
    return gradients(reference, doubled(arguments), grad.double())


@pytest.mark.parametrize("lengths", [None, (0, 3, 7), (7, 7, 1)], ids=str)
@pytest.mark.parametrize("scale", [(), (1, 1, 1)], ids=["scalar", "1x1x1"])
def test_equals_float64(lengths, scale):
    arguments = inputs(lengths=lengths, scale=scale)
    grad = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    grads = gradients(call, arguments, grad)
    expected = exact(arguments, grad)
    for actual, expected_grad in zip(grads, expected, strict=True):
        assert actual.shape == expected_grad.shape
        torch.testing.assert_close(actual.double(), expected_grad, rtol=1e-4, atol=1e-5)


def test_padding_gets_exactly_nothing_even_where_it_is_nan():
    arguments = inputs()
    with torch.no_grad():
        for item, length in enumerate((0, 3, 7)):
            arguments[0][item, length:] = torch.nan
    grads = gradients(call, arguments, torch.ones(3, 5, 16))
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[0][0].count_nonzero() == grads[0][1, 3:].count_nonzero() == 0


def test_gradients_come_in_the_dtypes_of_the_inputs():
    arguments = inputs()
    arguments[0] = arguments[0].detach().bfloat16().requires_grad_()
    grads = gradients(call, arguments, torch.ones(3, 5, 16, dtype=torch.bfloat16))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, *[torch.float32] * 8]


# opcheck looks at the gradients of tensors that it made itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("lengths", [None, (0, 3, 7)], ids=str)
def test_operations_are_registered_as_pytorch_wants_them(module, lengths):
    arguments = inputs(lengths=lengths)
    torch.library.opcheck(module._atrm, tuple(arguments))
    plain = [tensor.detach() if tensor is not None else None for tensor in arguments]
    torch.library.opcheck(module._gradient, (torch.ones(3, 5, 16), *plain))


def test_the_compiled_gradient_is_the_same():
    first, second = inputs(), inputs()
    call(first).square().sum().backward()
    torch.compile(lambda tensors: call(tensors).square().sum(), fullgraph=True, backend="aot_eager")(second).backward()
    for plain, compiled in zip(first, second, strict=True):
        if plain.is_floating_point():
            torch.testing.assert_close(compiled.grad, plain.grad, rtol=1e-5, atol=1e-6)
