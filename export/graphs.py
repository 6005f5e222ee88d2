"""The model as ONNX graphs in float32, from which the other precisions are made.

The graphs, their inputs and their outputs are listed in :mod:`finelip_fast.runtimes.graph`. They include encoder, aggregation
and L2 norms; row 0 of an embedding is the global one. ``length`` is 1 to the context length.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from finelip_fast._files import write_error
from finelip_fast.config import FineLIPConfig
from finelip_fast.kernels import clim_scores
from finelip_fast.model import FineLIP
from finelip_fast.runtimes.graph import Port, interface

OPSET = 20  # the first with Gelu as one operation
LEAST_OPSET = 18

# Most bytes of weights in one file. Protobuf holds no more than 2 GiB.
LARGEST_FILE = (1 << 31) - (1 << 24)


class _Image(nn.Module):
    def __init__(self, model: FineLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)


class _Text(nn.Module):
    def __init__(self, model: FineLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids)


class _ImageOfBytes(nn.Module):
    """Encoder of decoded pictures as stored in memory, including CLIP's normalisation."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: FineLIP) -> None:
        super().__init__()
        self.model = model
        # For pixels from 0 to 255: both include the division by 255.
        self.register_buffer("mean", 255 * torch.tensor(model.config.image_mean).reshape(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(model.config.image_std).reshape(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image((pixels.permute(0, 3, 1, 2).float() - self.mean) / self.std)


class _Scorer(nn.Module):
    def __init__(self, model: FineLIP) -> None:
        super().__init__()
        self.alpha = model.alpha

    def forward(self, queries: Tensor, items: Tensor) -> Tensor:
        return clim_scores(queries, items, alpha=self.alpha)


def build(
    model: FineLIP, graph: str, *, opset: int = OPSET, metadata: Mapping[str, Any] | None = None
) -> onnx.ModelProto:
    """Build a graph of the model in float32.

    Args:
        model: Model in float32 on the CPU.
        graph: Name from the table in :mod:`finelip_fast.runtimes.graph`.
        opset: ONNX operator set, at least 18.
        metadata: Additional values to write into the file as JSON, besides sizes, normalisation and tokenizer.

    Returns:
        The graph with its weights.
    """
    module = {"image": _Image, "text": _Text, "image_uint8": _ImageOfBytes, "scorer": _Scorer}[graph](model).eval()
    expected = interface(graph, model.config)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's remarks about itself
        program = torch.onnx.export(
            module,
            tuple(_example(name, port, model.config) for name, port in expected.inputs.items()),
            dynamo=True,
            opset_version=opset,
            input_names=list(expected.inputs),
            output_names=list(expected.outputs),
            dynamic_shapes={
                name: {axis: torch.export.Dim(size) for axis, size in enumerate(port.axes) if isinstance(size, str)}
                for name, port in expected.inputs.items()
            },
            verbose=False,
        )
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    for entry in (*proto.graph.node, *proto.graph.value_info, *proto.graph.initializer, proto.graph):
        del entry.metadata_props[:]  # stack traces of this machine
    proto.producer_name = "finelip_fast"
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in _facts(model, metadata).items()})
    return proto


def write(proto: onnx.ModelProto, path: Path) -> None:
    """Write a graph; weights too large for one file go to ``NAME.onnx.data`` beside it and are removed from ``proto``.

    Raises:
        WriteError: The graph cannot be written.
    """
    size = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    try:
        onnx.save(proto, path, save_as_external_data=size > LARGEST_FILE, location=f"{path.name}.data")
    except (OSError, RuntimeError) as error:  # the latter from native code
        raise write_error(path, error) from error


def _example(name: str, port: Port, config: FineLIPConfig) -> Tensor:
    """Example input for tracing. No free axis has a size that occurs in the model, or it would be taken as fixed."""
    if name == "ids":
        ids = torch.full((2, max(3, config.context_length - 1)), config.word_token)
        ids[:, -1] = config.end_token
        return ids
    sizes = [size if isinstance(size, int) else 2 + index for index, size in enumerate(port.axes)]
    dtype = torch.uint8 if port.dtype == "UINT8" else torch.float32
    return torch.ones(sizes, dtype=dtype)


def _facts(model: FineLIP, extra_facts: Mapping[str, Any] | None) -> dict[str, Any]:
    config = model.config
    return {
        "finelip.config": config.to_dict(),
        "finelip.alpha": model.alpha,
        "finelip.normalisation": {"mean": config.image_mean, "std": config.image_std, "resize": config.resize_mode},
        "finelip.tokenizer": {
            "name": "tokenizer.json" if config.tokenizer else "CLIP byte-level BPE",
            **({"sha256": config.tokenizer} if config.tokenizer else {}),
            "vocabulary": config.vocab_size,
            "start": next(iter(model.tokenizer.start), None),
            "end": config.end_token,
            "padding": config.pad_token,
            "context_length": config.context_length,
        },
        **(extra_facts or {}),
    }
