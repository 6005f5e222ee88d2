"""The ring of encoders: weights in the layout of transformers, and no time for wrong embeddings."""

from __future__ import annotations

import json

import numpy as np
import pytest
import ring_encoders
import ring_encoding
import torch
import transformers_layout
from apart import Answer, Failure
from contest import Result

import finelip_fast
from finelip_fast.checkpoint import UntrainedAggregatorsWarning

SIZES = {"embed_dim": 16, "image_size": 32, "patch_size": 16, "vision_width": 64, "vision_layers": 2, "vision_heads": 1}
SIZES |= {"text_width": 64, "text_layers": 2, "text_heads": 1, "context_length": 256}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return finelip_fast.FineLIP(finelip_fast.FineLIPConfig(**SIZES)).eval()


def test_the_layout_of_transformers_is_read_back_as_the_same_weights(model, tmp_path):
    transformers_layout.write(model, tmp_path / "clip")
    with pytest.warns(UntrainedAggregatorsWarning, match="transformers CLIPModel"):
        weights = finelip_fast.load(tmp_path / "clip").state_dict()
    towers = {name: value for name, value in model.state_dict().items() if name.startswith(("visual.", "text."))}
    assert towers
    for name, value in towers.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=0, msg=name)


def test_the_vocabulary_is_clips(model, tmp_path):
    transformers_layout.write(model, tmp_path / "clip")
    numbers = json.loads((tmp_path / "clip" / "vocab.json").read_text())
    assert (len(numbers), numbers["<|startoftext|>"], numbers["<|endoftext|>"]) == (49_408, 49_406, 49_407)
    merges = (tmp_path / "clip" / "merges.txt").read_text().splitlines()
    assert len(merges) == 1 + 49_408 - 512 - 2  # a version line; no bytes and no special tokens
    assert merges[1].split() == ["i", "n"]


class Process:
    """A contender's process that returns the same rows for every request."""

    def __init__(self, rows, failure=""):
        self.rows, self.failure, self.requests = rows, failure, 0

    def ask(self, *_):
        self.requests += 1
        if self.failure:
            raise Failure(self.failure)
        return Answer(self.rows, 0.5)


def test_wrong_embeddings_get_no_time(monkeypatch):
    monkeypatch.setattr(ring_encoding, "_PAUSE", 0)
    expected = np.eye(2, 4, dtype=np.float32)
    processes = {
        "right": Process(expected),
        "rounded": Process(expected + 0.04),
        "wrong": Process(expected + 0.04),
        "failing": Process(expected, failure="its process ended with exit status 1"),
    }
    precisions = {"right": "fp32", "rounded": "int8", "wrong": "fp32", "failing": "fp32"}
    results = {name: Result(info={"precision": precision}) for name, precision in precisions.items()}
    ring_encoding.timed(processes, results, ring_encoders.CAPTIONS, ["a", "b"], expected)
    assert {name: result.refusal for name, result in results.items()} == {
        "right": "",
        "rounded": "",
        "wrong": "wrong by 0.04, more than 0.001",
        "failing": "its process ended with exit status 1",
    }
    assert results["right"].info["items_per_second"] == 4.0
    assert len(results["right"].seconds) == ring_encoding.ROUNDS
    assert processes["wrong"].requests == processes["failing"].requests == 1


def test_batches_are_of_middling_captions_and_pictures_of_the_models_size(model):
    work = ring_encoding.batches(model.config)
    assert {cell: len(batch) for cell, batch in work.items()} == {
        (kind, size): size
        for kind in (ring_encoders.CAPTIONS, ring_encoders.PICTURES)
        for size in ring_encoding.BATCHES
    }
    assert work[ring_encoders.PICTURES, 1][0].size == (32, 32)


@pytest.mark.parametrize(
    "name",
    ["finelip_fast, torch, fp32", pytest.param("finelip_fast, ONNX, int8", marks=pytest.mark.slow), "open_clip, fp32"],
)
def test_those_without_peers_give_the_same_rows(model, name, tmp_path):
    """They run in this process; adapters of peers cannot be tested without the peers."""
    if "ONNX" in name:
        pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
        pytest.importorskip("onnxscript", reason="the exporter of torch needs onnxscript")
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "built"
    folder.mkdir()
    finelip_fast.save(model, checkpoint)
    encoder = ring_encoders.CONTENDERS[name]()
    encoder.build(checkpoint, folder)
    encoder.open(checkpoint, folder)
    work = ring_encoding.batches(model.config)
    engine = finelip_fast.Retriever(checkpoint, engine="torch").engine
    for kind, embed in ((ring_encoders.CAPTIONS, engine.embed_texts), (ring_encoders.PICTURES, engine.embed_images)):
        batch = work[kind, 32][:3]
        expected = embed(batch)[:, 0].numpy()
        np.testing.assert_allclose(
            encoder.encode(kind, batch), expected, atol=ring_encoding.ERRORS[encoder.precision], err_msg=kind
        )
