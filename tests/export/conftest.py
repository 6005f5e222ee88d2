"""A small model, its graphs in float32, and the parity gate with its reference answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from onnx import ModelProto

from finelip_fast.export import graphs, parity
from finelip_fast.model import FineLIP

torch.set_num_threads(1)

PAIRS = "scenes:test:70"


@pytest.fixture(scope="session")
def model(make_model: Callable[..., FineLIP]) -> FineLIP:
    return make_model(context_length=40, embed_dim=128, vision_width=128, text_width=128)


@pytest.fixture(scope="session")
def protos(model: FineLIP) -> dict[str, ModelProto]:
    """All graphs of the model. Tests must copy a graph before they change it."""
    return {name: graphs.build(model, name) for name in ("image", "text", "image_uint8", "scorer")}


@pytest.fixture(scope="session")
def reference(model: FineLIP) -> parity.Reference:
    return parity.Reference(model, PAIRS, progress=False)


@pytest.fixture(scope="session")
def prove(reference: parity.Reference) -> Callable[..., parity.Report]:
    """Return a function that runs the parity gate on graphs with ONNX Runtime."""
    from finelip_fast.runtimes.onnx import OnnxGraph

    def run(image: ModelProto, text: ModelProto, precision: str = "fp32", **extras: ModelProto) -> parity.Report:
        graphs_ = {"image": image, "text": text, **extras}
        runners = {}
        for name, proto in graphs_.items():
            runners[name] = OnnxGraph(proto.SerializeToString(), torch.device("cpu"))
        encoders = parity.Encoders(
            runners["image"], runners["text"], extras={name: runners[name] for name in extras}, graphs=graphs_
        )
        return parity.prove(reference, encoders, precision)

    return run
