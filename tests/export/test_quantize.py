"""int8: what is quantized and how accurately, rows independent of their batch, and scales found by calibration."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from finelip_fast.export import quantize
from finelip_fast.export.precision import in_half
from finelip_fast.runtimes.onnx import OnnxGraph

CPU = torch.device("cpu")


def linear(weight, bias=None):
    """Return a graph of one layer, ``[rows, K]`` to ``[rows, N]``."""
    inputs, constants = ["x", "w"], [numpy_helper.from_array(weight, "w")]
    if bias is not None:
        inputs.append("b")
        constants.append(numpy_helper.from_array(bias, "b"))
    graph = helper.make_graph(
        [helper.make_node("Gemm" if bias is not None else "MatMul", inputs, ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", weight.shape[1]])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(proto, x):
    return OnnxGraph(proto.SerializeToString(), CPU)(torch.from_numpy(x)).numpy()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), depth=st.integers(1, 300), bias=st.booleans())
def test_a_layer_by_rows_is_as_exact_as_its_steps(seed, depth, bias):
    random = np.random.default_rng(seed)
    # Row and column sizes vary widely: a single scale would lose the small ones.
    x = (random.standard_normal((5, depth)) * 10.0 ** random.integers(-3, 4, (5, 1))).astype(np.float32)
    weight = (random.standard_normal((depth, 128)) * 10.0 ** random.integers(-3, 3, 128)).astype(np.float32)
    offset = random.standard_normal(128).astype(np.float32) if bias else None
    proto = quantize.by_rows(linear(weight, offset))
    onnx.checker.check_model(proto, full_check=True)
    product = run(proto, x) - (0 if offset is None else offset)
    row_step, column_step = np.abs(x).max(axis=1, keepdims=True) / 127, np.abs(weight).max(axis=0) / 127
    bound = 0.5 * (row_step * np.abs(weight).sum(axis=0) + column_step * np.abs(x).sum(axis=1, keepdims=True))
    bound = bound + 0.25 * depth * row_step * column_step
    exact = x.astype(np.float64) @ weight.astype(np.float64)
    float32 = 1e-6 * (np.abs(exact) + (0 if offset is None else np.abs(offset)))
    assert (np.abs(product - exact) <= 1.001 * bound + float32).all()


def test_a_row_does_not_depend_on_its_company():
    """This includes the runtime's fusions; one of them used to apply the first row's scale to all rows."""
    random = np.random.default_rng(0)
    proto = quantize.by_rows(linear(random.standard_normal((256, 128)).astype(np.float32)))
    x = (random.standard_normal((7, 256)) * 10.0 ** np.arange(-3, 4)[:, None]).astype(np.float32)
    together = run(proto, x)
    for row in range(7):
        np.testing.assert_array_equal(run(proto, x[row : row + 1]), together[row : row + 1])


def test_a_row_of_zeros_gives_zeros():
    proto = quantize.by_rows(linear(np.ones((16, 128), np.float32)))
    assert not run(proto, np.zeros((2, 16), np.float32)).any()


def test_narrow_layers_and_products_of_activations_stay(protos):
    proto = quantize.by_rows(protos["text"])
    kinds = [node.op_type for node in proto.graph.node]
    # Input, output and two MLP layers per block, plus the projection.
    assert kinds.count("MatMulInteger") == 4 * 2 + 1
    # Two products of attention per block; two layers and the pooling of ATRM.
    assert kinds.count("MatMul") + kinds.count("Gemm") == 2 * 2 + 3


def test_calibrated_layers_take_their_scales_from_the_data(protos, reference, model):
    half = in_half(protos["image"], "fp16")
    proto = quantize.calibrated(half, [{"pixels": reference.pixels[:8].numpy()}])
    onnx.checker.check_model(proto)
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("QuantizeLinear") >= 4 * 2 + 1 - 2
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    scales = [value for name, value in constants.items() if name.endswith("_scale") and value.ndim == 0]
    assert scales
    assert all(scale.dtype == np.float16 and 0 < scale < 1 for scale in scales)
    embeddings = OnnxGraph(proto.SerializeToString(), CPU)(reference.pixels[8:16])
    cosine = (embeddings * reference.images[8:16]).sum(-1)
    assert cosine.min() > 0.98


@pytest.mark.parametrize("shape", [(4, 128), (1, 1)])
def test_a_weight_is_within_half_a_step(shape):
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    values, scales = quantize.quantize_weight(weight)
    assert values.dtype == np.int8
    assert (np.abs(values * scales - weight) <= 0.5001 * scales).all()


def test_a_column_of_zeros_has_a_scale():
    values, scales = quantize.quantize_weight(np.zeros((3, 2), np.float32))
    assert not values.any()
    assert (scales == 1).all()
