"""Check of the weights in an exported graph, without running it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from onnx import ModelProto, TensorProto, numpy_helper

from finelip_fast.export.precision import rounded
from finelip_fast.export.quantize import quantize_weight
from finelip_fast.model import FineLIP

_WEIGHT_TYPES = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8}


def weight_problems(graph: ModelProto, model: FineLIP) -> tuple[int, list[str]]:
    """Count a graph's constants, and describe those that are not the model's weights, each with the nearest weight."""
    known = _Weights(model)
    count, wrong = 0, []
    for tensor in graph.graph.initializer:
        if tensor.data_type not in _WEIGHT_TYPES or np.prod(tensor.dims, dtype=int) < 2:
            continue  # shapes, and single numbers
        values = numpy_helper.to_array(tensor)
        problem = known.problem(values)
        if problem:
            wrong.append(f"{tensor.name} {list(values.shape)} {problem}")
        count += 1
    return count, wrong


class _Weights:
    """The model's weights in every form that an exporter writes."""

    def __init__(self, model: FineLIP) -> None:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        config = model.config
        tensors |= {"mean of colours": 255 * torch.tensor(config.image_mean).reshape(3, 1, 1)}
        tensors |= {"deviation of colours": 255 * torch.tensor(config.image_std).reshape(3, 1, 1)}
        self._exact = {name: value.detach().float().cpu().numpy() for name, value in tensors.items()}
        self._quantized: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def problem(self, values: np.ndarray) -> str:
        """Describe what is wrong with a constant; empty if it is a weight, or all zeros."""
        if not values.any():
            return ""
        nearest, fewest = "is no weight of the checkpoint", values.size
        for name, weight in self._forms(values):
            different = values != weight
            count = int(different.sum())
            if not count:
                return ""
            if count < fewest:
                gap = np.abs(values.astype(np.float64) - weight.astype(np.float64)).max()
                nearest = f"differs from {name} in {count:,} of {values.size:,} values, by up to {gap:.3g}"
                fewest = count
        return nearest

    def _forms(self, like: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yield every form of a weight that has this type and shape."""
        for name, weight in self._exact.items():
            for label, form in ((name, weight), (f"{name}, transposed", weight.T)):
                if label != name and weight.ndim != 2:
                    continue
                if like.dtype != np.int8 and form.size == like.size and form.squeeze().shape == like.squeeze().shape:
                    yield label, rounded(form, like.dtype).reshape(like.shape)
                if form.ndim != 2 or like.shape not in (form.shape, form.shape[1:]):
                    continue
                for values, scales in (self._quantize(label, form, dtype) for dtype in (np.float32, np.float16)):
                    if like.dtype == np.int8 and like.shape == values.shape:
                        yield f"{label}, quantized", values
                    elif like.dtype != np.int8 and like.shape == scales.shape:
                        yield f"{label}, scales", scales.astype(like.dtype)

    def _quantize(self, label: str, weight: np.ndarray, dtype: type) -> tuple[np.ndarray, np.ndarray]:
        """Quantise a weight from float32, or from its values rounded to float16."""
        key = f"{label} {dtype.__name__}"
        if key not in self._quantized:
            self._quantized[key] = quantize_weight(rounded(weight, np.dtype(dtype)))
        return self._quantized[key]
