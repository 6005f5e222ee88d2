"""Graphs in int8: linear layers multiply 8-bit numbers, everything else is unchanged.

Weights ``[K, N]`` are quantized symmetrically with a scale for each column. The rows that they multiply are scaled either

- row by row at run time (:func:`by_rows`, for ONNX Runtime): a row's result depends on that row alone, so an embedding is the
  same in any batch, which one scale for a whole tensor would break; or
- by one constant per layer from calibration (:func:`calibrated`, for TensorRT, which supports nothing else).

Layers with fewer than ``LEAST_COLUMNS`` outputs are unchanged: they cost nothing, and those of ATRM weight whole tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from finelip_fast.export.graphs import write
from finelip_fast.runtimes.onnx import load_onnxruntime, session_options

LEAST_COLUMNS = 128
GREATEST = 127

# Share of a layer's inputs that are within the calibrated range; the rest are clipped to it.
_WITHIN = 0.9999

Array = NDArray[np.floating]


def quantize_weight(weight: Array) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize ``[K, N]`` to int8 values and a scale for each of the ``N`` columns."""
    scale = np.abs(weight.astype(np.float32)).max(axis=0) / GREATEST
    scale[scale == 0] = 1
    return np.round(weight / scale).astype(np.int8), scale


def by_rows(proto: ModelProto) -> ModelProto:
    """Convert the linear layers of a float32 graph to int8, with rows scaled at run time.

    Args:
        proto: Graph from :func:`finelip_fast.export.graphs.build`, which is not changed.
    """
    result, layers = _copy(proto)
    # Rows are uint8 around 128: with AVX-512 VNNI, ONNX Runtime multiplies uint8 by int8 ten times as fast as int8 by int8.
    constants = {
        "int8_last_axis": np.array([-1], np.int64),
        "int8_least": np.float32(1e-12),
        "int8_greatest": np.float32(GREATEST),
        "int8_one": np.float32(1),
        "int8_zero": np.uint8(128),
    }
    nodes: list[NodeProto] = []
    rows: dict[str, tuple[str, str]] = {}  # quantized rows and their scales, by input

    def op(kind: str, *inputs: str, out: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [out], name=out, **attributes))
        return out

    for node in proto.graph.node:
        layer = layers.get(node.output[0])
        if layer is None:
            nodes.append(node)
            continue
        x, y = node.input[0], node.output[0]
        if x not in rows:
            greatest = op("ReduceMax", op("Abs", x, out=f"{x}_abs"), "int8_last_axis", out=f"{x}_max", keepdims=1)
            above_zero = op("Max", greatest, "int8_least", out=f"{x}_above_zero")
            scale = op("Div", above_zero, "int8_greatest", out=f"{x}_scale")
            scaled = op("Div", x, scale, out=f"{x}_scaled")
            # Rounds, shifts and casts at once.
            rows[x] = op("QuantizeLinear", scaled, "int8_one", "int8_zero", out=f"{x}_uint8"), scale
        quantized, scale = rows[x]
        constants[f"{y}_weight"], constants[f"{y}_weight_scale"] = quantize_weight(layer)
        total = op("MatMulInteger", quantized, f"{y}_weight", "int8_zero", out=f"{y}_int32")
        value = op("Cast", total, out=f"{y}_total", to=TensorProto.FLOAT)
        # In this order: a product of the two scales would match a pattern that ONNX Runtime fuses with one scale for all rows,
        # and version 1.32 would then use the first row's scale for all.
        by_columns = op("Mul", value, f"{y}_weight_scale", out=f"{y}_by_columns")
        bias = list(node.input[2:])
        product = op("Mul", by_columns, scale, out=f"{y}_product" if bias else y)
        if bias:
            op("Add", product, bias[0], out=y)
    return _finish(result, nodes, constants)


def calibrated(proto: ModelProto, batches: Iterable[dict[str, np.ndarray]]) -> ModelProto:
    """Convert a graph's linear layers to int8, with one constant scale per layer input (QuantizeLinear, DequantizeLinear).

    Args:
        proto: Graph in float16 or float32; whatever is not int8 keeps this type.
        batches: Inputs of the graph to calibrate with, as :meth:`onnxruntime.InferenceSession.run` takes them.
    """
    result, layers = _copy(proto)
    inputs = list(dict.fromkeys(node.input[0] for node in proto.graph.node if node.output[0] in layers))
    ranges = _ranges(proto, inputs, batches)
    constants: dict[str, np.ndarray] = {}
    nodes: list[NodeProto] = []
    quantised: dict[str, str] = {}
    for node in proto.graph.node:
        layer = layers.get(node.output[0])
        if layer is not None:
            x, y = node.input[0], node.output[0]
            if x not in quantised:
                constants[f"{x}_scale"] = np.asarray(ranges[x] / GREATEST, layer.dtype)
                constants[f"{x}_zero"] = np.zeros((), np.int8)
                scale = (f"{x}_scale", f"{x}_zero")
                nodes.append(helper.make_node("QuantizeLinear", [x, *scale], [f"{x}_int8"]))
                nodes.append(helper.make_node("DequantizeLinear", [f"{x}_int8", *scale], [f"{x}_rounded"]))
                quantised[x] = f"{x}_rounded"
            values, scales = quantize_weight(layer)
            constants[f"{y}_weight"], constants[f"{y}_weight_scale"] = values, scales.astype(layer.dtype)
            constants[f"{y}_weight_zero"] = np.zeros(len(scales), np.int8)
            weight = [f"{y}_weight", f"{y}_weight_scale", f"{y}_weight_zero"]
            nodes.append(helper.make_node("DequantizeLinear", weight, [f"{y}_weight_rounded"], axis=1))
            bias = list(node.input[2:])
            nodes.append(
                helper.make_node("MatMul", [quantised[x], f"{y}_weight_rounded"], [f"{y}_product" if bias else y])
            )
            if bias:
                nodes.append(helper.make_node("Add", [f"{y}_product", bias[0]], [y]))
        else:
            nodes.append(node)
    return _finish(result, nodes, constants)


def _copy(proto: ModelProto) -> tuple[ModelProto, dict[str, Array]]:
    """Copy a graph, and collect the weights ``[K, N]`` of the layers to quantize, by the names of their outputs."""
    result = ModelProto()
    result.CopyFrom(proto)
    return result, dict(_layers(proto))


def _layers(proto: ModelProto) -> Iterator[tuple[str, Array]]:
    weights = {tensor.name: tensor for tensor in proto.graph.initializer if len(tensor.dims) == 2}
    for node in proto.graph.node:
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in weights:
            continue
        weight = numpy_helper.to_array(weights[node.input[1]])
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if attributes.get("transB"):
            weight = weight.T
        if weight.shape[1] >= LEAST_COLUMNS:
            yield node.output[0], weight


def _ranges(proto: ModelProto, names: list[str], batches: Iterable[dict[str, np.ndarray]]) -> dict[str, float]:
    """Largest magnitude of each tensor over all batches, ignoring outliers."""
    watched = ModelProto()
    watched.CopyFrom(proto)
    watched.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    with tempfile.TemporaryDirectory() as scratch:
        write(watched, Path(scratch) / "watched.onnx")
        session = load_onnxruntime().InferenceSession(
            Path(scratch) / "watched.onnx", session_options(), providers=["CPUExecutionProvider"]
        )
    ranges = dict.fromkeys(names, 1e-6)
    for batch in batches:
        for name, values in zip(names, session.run(names, batch), strict=True):
            within = float(np.quantile(np.abs(values.astype(np.float32)), _WITHIN))
            ranges[name] = max(ranges[name], within)
    return ranges


def _finish(result: ModelProto, nodes: list[NodeProto], constants: dict[str, np.ndarray]) -> ModelProto:
    graph = result.graph
    used = {name for node in nodes for name in node.input}
    initializers = [tensor for tensor in graph.initializer if tensor.name in used]
    added = [numpy_helper.from_array(np.asarray(values, order="C"), name) for name, values in constants.items()]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*initializers, *added])
    return result
