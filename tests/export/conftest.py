"""A small model, its graphs in float32, and its answers to the gate's questions."""

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
    """Every graph of the model. Tests that change one copy it."""
    return {name: graphs.build(model, name) for name in ("image", "text", "image_uint8", "scorer")}


@pytest.fixture(scope="session")
def reference(model: FineLIP) -> parity.Reference:
    return parity.Reference(model, PAIRS, progress=False)


@pytest.fixture(scope="session")
def prove(reference: parity.Reference) -> Callable[..., parity.Report]:
    """Puts graphs, as ONNX Runtime runs them, to the gate."""
    from finelip_fast.runtimes.onnx import OnnxGraph

    def run(image: ModelProto, text: ModelProto, precision: str = "fp32", **more: ModelProto) -> parity.Report:
        graphs_ = {"image": image, "text": text, **more}
        runners = {}
        for name, proto in graphs_.items():
            runners[name] = OnnxGraph(proto.SerializeToString(), torch.device("cpu"))
        encoders = parity.Encoders(
            runners["image"], runners["text"], extras={name: runners[name] for name in more}, graphs=graphs_
        )
        return parity.prove(reference, encoders, precision)

    return run
