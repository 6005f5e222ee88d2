"""Graphs: they declare inputs and outputs, include what a reader needs, and reveal nothing about the machine."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch

from finelip_fast.export import graphs
from finelip_fast.export.parity import levels
from finelip_fast.runtimes.graph import interface_problems
from finelip_fast.runtimes.onnx import OnnxGraph


@pytest.mark.parametrize("name", ["image", "text", "image_uint8", "scorer"])
def test_a_graph_keeps_its_promise(protos, model, name):
    onnx.checker.check_model(protos[name], full_check=True)
    assert interface_problems(protos[name], name, model.config) == []
    assert protos[name].opset_import[0].version == graphs.OPSET
    assert not [node.op_type for node in protos[name].graph.node if node.op_type in ("ArgMax", "TopK")]
    assert {node.domain for node in protos[name].graph.node} == {""}


@pytest.mark.parametrize("name", ["image", "text"])
def test_no_constant_is_infinite(protos, name):
    for tensor in protos[name].graph.initializer:
        assert np.isfinite(onnx.numpy_helper.to_array(tensor)).all(), tensor.name


def test_the_file_says_what_it_is(model):
    proto = graphs.build(model, "scorer", metadata={"finelip.checkpoint": "abc"})
    facts = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    assert facts["finelip.config"] == json.loads(json.dumps(model.config.to_dict()))
    assert facts["finelip.checkpoint"] == "abc"
    assert facts["finelip.alpha"] == model.alpha
    assert facts["finelip.tokenizer"]["context_length"] == 40
    assert facts["finelip.tokenizer"]["end"] == 49407
    assert facts["finelip.normalisation"]["mean"] == list(model.config.image_mean)


def test_nothing_of_this_machine_is_in_the_file(protos):
    for proto in protos.values():
        assert b".py" not in proto.SerializeToString()


def test_bytes_of_a_picture_give_its_embedding(protos, model, reference):
    graph = OnnxGraph(protos["image_uint8"].SerializeToString(), torch.device("cpu"))
    embeddings = graph(levels(reference.pixels[:3], model.config))
    torch.testing.assert_close(embeddings, reference.images[:3], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5)])
def test_the_scorer_scores(protos, model, reference, shape):
    graph = OnnxGraph(protos["scorer"].SerializeToString(), torch.device("cpu"))
    queries, items = reference.texts[: shape[0]], reference.images[: shape[1]]
    torch.testing.assert_close(graph(queries, items), model.score(queries, items), atol=1e-5, rtol=0)


def test_an_older_opset_gives_the_same(model, reference):
    proto = graphs.build(model, "text", opset=18)
    assert proto.opset_import[0].version == 18
    graph = OnnxGraph(proto.SerializeToString(), torch.device("cpu"))
    torch.testing.assert_close(graph(reference.captions[:4]), reference.texts[:4], atol=1e-5, rtol=0)
