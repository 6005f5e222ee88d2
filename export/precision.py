"""Graphs in half precision: products in float16 or bfloat16, sensitive operations in float32.

The rules are those of autocast. A product (``PRODUCTS``) takes and returns half precision; operations that move or scale
numbers (``FOLLOWERS``) keep the precision of their inputs; everything else is float32: LayerNorm, softmax, norms, and the
residual sums, where half precision loses most. Inputs and outputs of the graph keep their types.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

HALF = {
    "fp16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}

PRODUCTS = {
    "fp16": {"MatMul", "Gemm", "Conv"},
    "bf16": {"MatMul", "Gemm"},  # ONNX has Conv in bfloat16 from operator set 22 on
}
MOVERS = {
    *(
        "Reshape",
        "Transpose",
        "Slice",
        "Squeeze",
        "Unsqueeze",
        "Gather",
        "GatherND",
        "Concat",
        "Split",
        "Expand",
        "Identity",
    ),
}
FOLLOWERS = MOVERS | {"Add", "Mul", "Sigmoid", "Gelu"}  # bias and activation between two products
_GREATEST = float(np.finfo(np.float16).max)


def in_half(proto: ModelProto, precision: str) -> ModelProto:
    """Convert a float32 graph to half precision.

    Args:
        proto: Graph from :func:`finelip_fast.export.graphs.build`, which is not changed.
        precision: ``"fp16"`` or ``"bf16"``.

    Returns:
        A new graph. Constants that float16 cannot hold become its largest number, so that nothing is infinite.
    """
    result = ModelProto()
    result.CopyFrom(proto)
    return _Halver(result, precision).run()


def rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Convert constants to another precision without making any infinite."""
    if dtype == np.float16:
        values = values.clip(-_GREATEST, _GREATEST)
    return values.astype(dtype)


class _Halver:
    def __init__(self, proto: ModelProto, precision: str) -> None:
        self.proto, self.products = proto, PRODUCTS[precision]
        self.kind, self.dtype = HALF[precision]
        self.constants = {
            tensor.name: tensor for tensor in proto.graph.initializer if tensor.data_type == TensorProto.FLOAT
        }
        self.half: set[str] = set()  # activations that are held in half precision
        self.kept: set[str] = set()  # constants that are still needed in float32
        self.casts: dict[tuple[str, bool], str] = {}
        self.nodes: list[NodeProto] = []
        self.rounded: list[TensorProto] = []

    def run(self) -> ModelProto:
        graph = self.proto.graph
        types = _element_types(self.proto)
        outputs = {output.name for output in graph.output}
        for node in graph.node:
            floats = [name for name in node.input if name in self.constants or types.get(name) == TensorProto.FLOAT]
            moving = [name for name in floats if name not in self.constants]
            # Without activations, it takes rows of a constant table, such as the word embeddings.
            if node.op_type in self.products or not moving:
                low = bool(floats)
            else:
                low = node.op_type in FOLLOWERS and all(name in self.half for name in moving)
            low = low and outputs.isdisjoint(node.output)
            for index, name in enumerate(node.input):
                if name in floats:
                    node.input[index] = self._held(name, low)
            self.nodes.append(node)
            if low:
                self.half.update(node.output)
        initializers = [t for t in graph.initializer if t.name not in self.constants or t.name in self.kept]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend([*initializers, *self.rounded])
        return self.proto

    def _held(self, name: str, low: bool) -> str:
        """Name of a value in half precision (``low``) or float32, with a cast if needed."""
        if name in self.constants:
            if not low:
                self.kept.add(name)
                return name
        elif (name in self.half) == low:
            return name
        if (name, low) not in self.casts:
            self.casts[name, low] = f"{name}_{'half' if low else 'float'}"
            if name in self.constants:
                values = rounded(numpy_helper.to_array(self.constants[name]), self.dtype)
                self.rounded.append(numpy_helper.from_array(values, self.casts[name, low]))
            else:
                to = self.kind if low else TensorProto.FLOAT
                self.nodes.append(helper.make_node("Cast", [name], [self.casts[name, low]], to=to))
        return self.casts[name, low]


def rounding_twin(proto: ModelProto) -> ModelProto:
    """Convert a half-precision graph to one that computes each result in float32 and rounds it, as GPUs do.

    It is for a runtime without products of that type: ONNX Runtime has no bfloat16 on a CPU, and computes float16 there in
    float32 throughout, which hides an overflow.
    """
    result = ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    types = _element_types(proto) | {tensor.name: tensor.data_type for tensor in graph.initializer}
    half = {name: kind for name, kind in types.items() if kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16)}
    for tensor in graph.initializer:
        if tensor.name in half:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    nodes = []
    for node in graph.node:
        nodes.append(node)
        name = node.output[0]
        if name not in half:
            continue
        if node.op_type == "Cast":
            node.attribute[0].i = TensorProto.FLOAT
        if node.op_type not in MOVERS:
            node.output[0] = f"{name}_exact"
            nodes.append(helper.make_node("Cast", [node.output[0]], [f"{name}_rounded"], to=half[name]))
            nodes.append(helper.make_node("Cast", [f"{name}_rounded"], [name], to=TensorProto.FLOAT))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return result


def _element_types(proto: ModelProto) -> dict[str, int]:
    """Infer the element types of all activations, without those of the weights."""
    graph = onnx.shape_inference.infer_shapes(proto).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
