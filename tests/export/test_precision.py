"""Half precision: products use it, sensitive operations do not, and constants stay finite."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from finelip_fast.export.precision import HALF, PRODUCTS, in_half, rounding_twin
from finelip_fast.runtimes.onnx import OnnxGraph

KINDS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def types_of(proto):
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in proto.graph.initializer}


@pytest.mark.parametrize("name", ["image", "text"])
@pytest.mark.parametrize("precision", HALF)
def test_products_are_in_half_and_what_is_sensitive_in_float32(protos, name, precision):
    half = in_half(protos[name], precision)
    onnx.checker.check_model(half, full_check=True)
    types = types_of(half)
    counts = Counter()
    for node in half.graph.node:
        if node.op_type in PRODUCTS[precision]:
            assert {types[operand] for operand in node.input} == {KINDS[precision]}
        if node.op_type in ("LayerNormalization", "Softmax", "ReduceL2"):
            assert {types[operand] for operand in node.input if types[operand] != TensorProto.INT64} == {
                TensorProto.FLOAT
            }
        counts[node.op_type] += 1
    assert counts["MatMul"] + counts["Gemm"] > 10
    assert counts["LayerNormalization"] > 4
    assert types[half.graph.output[0].name] == TensorProto.FLOAT


@pytest.mark.parametrize("precision", HALF)
def test_files_are_half_as_large(protos, precision):
    for name in ("image", "text"):
        share = in_half(protos[name], precision).ByteSize() / protos[name].ByteSize()
        assert share < 0.56


def test_the_graph_that_is_converted_stays_as_it_is(protos):
    before = protos["text"].SerializeToString()
    in_half(protos["text"], "fp16")
    assert protos["text"].SerializeToString() == before


def test_a_constant_past_float16_becomes_its_greatest_number():
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Softmax", ["y"], ["z"])],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(np.array([[1e9, -1e9], [1, 2]], np.float32), "w")],
    )
    half = in_half(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), "fp16")
    (weight,) = half.graph.initializer
    assert numpy_helper.to_array(weight).tolist() == [[65504, -65504], [1, 2]]


def test_what_a_graph_gives_is_float32_also_from_a_product():
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "line",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])],
        [numpy_helper.from_array(np.float32([[2]]), "w")],
    )
    half = in_half(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), "fp16")
    onnx.checker.check_model(half, full_check=True)
    assert types_of(half)["y"] == TensorProto.FLOAT


@pytest.mark.parametrize("precision", HALF)
def test_the_twin_rounds_what_the_graph_would_round(precision):
    """A product and a sum by hand: each result is rounded once."""
    x, w, b = np.float32([[1.001, 2.003]]), np.float32([[3.007], [5.011]]), np.float32([7.013])
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["y"]),
            helper.make_node("Add", ["y", "b"], ["s"]),
            helper.make_node("Softmax", ["s"], ["unused"]),
            helper.make_node("ReduceSum", ["s"], ["z"], keepdims=0),
        ],
        "line",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    twin = rounding_twin(in_half(model, precision))
    output = OnnxGraph(twin.SerializeToString(), torch.device("cpu"))(torch.from_numpy(x))
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    x, w, b = (torch.from_numpy(array).to(dtype).float() for array in (x, w, b))
    assert output.item() == ((x @ w).to(dtype).float() + b).to(dtype).item()
