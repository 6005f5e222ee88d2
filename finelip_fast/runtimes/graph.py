"""Inspection of an ONNX file before anything runs it: its inputs and outputs, its operators, and the files beside it.

============  =====================================================  ==============================================
graph         input                                                  output, float32
============  =====================================================  ==============================================
image         ``pixels`` float32 ``[batch, 3, S, S]``, normalised    ``embeddings [batch, L, D]``
text          ``ids`` int64 ``[batch, length]``                      ``embeddings [batch, L, D]``
image_uint8   ``pixels`` uint8 ``[batch, S, S, 3]``                  ``embeddings [batch, L, D]``
scorer        ``queries [queries, L, D]``, ``items [items, L, D]``   ``scores [queries, items]``
============  =====================================================  ==============================================

"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from finelip_fast._files import plain_name
from finelip_fast.config import FineLIPConfig
from finelip_fast.errors import EngineError
from finelip_fast.runtimes.onnx import INSTALL

try:
    import onnx
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
except ImportError as error:
    raise EngineError(f"onnx is not installed ({error}): {INSTALL}") from None

_DOMAINS = ("", "ai.onnx")  # of ONNX's own operators

# Field numbers in onnx.proto, from a model to the values of its graph's constants.
_WEIGHTS = (7, 5, 9)
# Most bytes of a graph besides those: nodes take many times as much memory, and the largest model has a tenth of this.
_LARGEST_REST = 1 << 22


class Port(NamedTuple):
    """An input or output: its element type by ONNX's name, and its axes, with names for free ones."""

    dtype: str
    axes: tuple[str | int, ...]


class Interface(NamedTuple):
    """Inputs and outputs of a graph."""

    inputs: dict[str, Port]
    outputs: dict[str, Port]


def interface(graph: str, config: FineLIPConfig) -> Interface:
    """Inputs and outputs that a graph of this model must have; ``graph`` is a name from the module's table."""
    side, rows, width = config.image_size, config.tokens, config.embed_dim
    embeddings = {"embeddings": Port("FLOAT", ("batch", rows, width))}
    return {
        "image": Interface({"pixels": Port("FLOAT", ("batch", 3, side, side))}, embeddings),
        "text": Interface({"ids": Port("INT64", ("batch", "length"))}, embeddings),
        "image_uint8": Interface({"pixels": Port("UINT8", ("batch", side, side, 3))}, embeddings),
        "scorer": Interface(
            {"queries": Port("FLOAT", ("queries", rows, width)), "items": Port("FLOAT", ("items", rows, width))},
            {"scores": Port("FLOAT", ("queries", "items"))},
        ),
    }[graph]


def parse(content: bytes, name: str, *, weights: bool = True) -> ModelProto:
    """Parse the graph in a file's content; weights in files beside it are not loaded.

    Args:
        content: Content of the file.
        name: Name of the file in messages.
        weights: Whether to keep the values of the graph's constants; without, parsing takes next to no time and memory.

    Raises:
        EngineError: The content is not a graph, or has what no export has: operators of another domain than ONNX's own,
            functions, weights in a file that is not beside it, or many times more than the nodes of a large model.
    """
    try:
        rest = _without_weights(memoryview(content))
        proto = onnx.load_model_from_string(content if weights else rest)
    except Exception as error:  # protobuf's own, of which there are two implementations
        raise EngineError(f"{name}: expected an ONNX graph: {str(error).strip()[:200]}") from None
    if proto.functions or proto.training_info:
        raise EngineError(f"{name}: expected a graph of operators only, found functions")
    for node in _nodes(proto.graph):
        if node.domain not in _DOMAINS:
            raise EngineError(
                f"{name}: expected standard ONNX operators, found {node.domain!r:.80}.{node.op_type!r:.80}"
            )
    external_files(proto, name)
    return proto


def _without_weights(message: memoryview, fields: Sequence[int] = _WEIGHTS, room: int = _LARGEST_REST) -> bytes:
    """Remove the field that a path of field numbers leads to from a protobuf message.

    Raises:
        ValueError: The message is cut off, or more than ``room`` bytes are left.
    """
    parts: list[bytes | memoryview] = []
    at = 0
    while at < len(message):
        start = at
        tag, at = _number(message, at)
        kind = tag & 7
        if kind == 0:
            _, at = _number(message, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            size, at = _number(message, at)
            inner, at = message[at : at + size], at + size
            if tag >> 3 == fields[0]:
                if len(fields) > 1 and at <= len(message):
                    rest = _without_weights(inner, fields[1:], room)
                    parts.append(b"".join((_varint(tag), _varint(len(rest)), rest)))
                    room -= len(parts[-1])
                start = at
        else:
            raise ValueError(f"a field of kind {kind}")
        if at > len(message):
            raise ValueError("it is truncated")
        parts.append(message[start:at])
        room -= at - start
        if room < 0:
            raise ValueError(f"more than {_LARGEST_REST} bytes besides its weights")
    return b"".join(parts)


def _number(message: memoryview, at: int) -> tuple[int, int]:
    """Read the number that starts at a position, seven bits per byte; also return the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at == len(message):
            break
        byte = message[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise ValueError("it is truncated")


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def external_files(proto: ModelProto, name: str) -> list[str]:
    """Names of the files beside a graph that hold its weights, each once.

    Raises:
        EngineError: A name that leads elsewhere.
    """
    names: dict[str, None] = {}
    for tensor in _tensors(proto.graph):
        if tensor.external_data or tensor.data_location == TensorProto.EXTERNAL:
            location = {entry.key: entry.value for entry in tensor.external_data}.get("location")
            names[plain_name(location, f"{name}, weights of {tensor.name!r:.80}", error=EngineError)] = None
    return list(names)


def interface_problems(graph: ModelProto, name: str, config: FineLIPConfig) -> list[str]:
    """Describe how names, axes and element types differ from what the graph's name promises; empty if they are right."""
    expected = interface(name, config)
    weights = {tensor.name for tensor in graph.graph.initializer}
    wrong = []
    for kind, ports, values in (
        ("input", expected.inputs, [value_info for value_info in graph.graph.input if value_info.name not in weights]),
        ("output", expected.outputs, graph.graph.output),
    ):
        present = {value.name: _port(value) for value in values}
        if list(present) != list(ports):
            wrong.append(f"expected {kind}s {list(ports)}, got {list(present)}")
            continue
        for port, (dtype, axes) in ports.items():
            if present[port].dtype != dtype:
                wrong.append(f"{port}: expected {dtype}, got {present[port].dtype}")
            if len(present[port].axes) != len(axes):
                wrong.append(f"{port}: expected {len(axes)} axes, got {len(present[port].axes)}")
                continue
            for number, (want, got) in enumerate(zip(axes, present[port].axes, strict=True)):
                if isinstance(want, str) and isinstance(got, int):
                    wrong.append(f"{port}: axis {number} ({want}) is frozen at {got}, expected any size")
                elif isinstance(want, int) and got != want:
                    wrong.append(f"{port}: axis {number} is {got!r}, expected {want}")
    return wrong


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Yield all nodes, including those of inner graphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in _inner(attribute):
                yield from _nodes(inner)


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Yield all constants, wherever they can be."""
    sparse = list(graph.sparse_initializer)
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
            for inner in _inner(attribute):
                yield from _tensors(inner)
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)


def _inner(attribute: AttributeProto) -> list[GraphProto]:
    return [attribute.g, *attribute.graphs] if attribute.HasField("g") else list(attribute.graphs)


def _port(value: ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    axes = tuple(axis.dim_value if axis.HasField("dim_value") else axis.dim_param or "?" for axis in tensor.shape.dim)
    known = tensor.elem_type in TensorProto.DataType.values()
    return Port(TensorProto.DataType.Name(tensor.elem_type) if known else f"type {tensor.elem_type}", axes)
