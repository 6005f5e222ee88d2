"""Engines on a SigLIP: the same embeddings as the model's, using the checkpoint's tokenizer."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

import finelip_fast
from finelip_fast import checkpoint as checkpoints
from finelip_fast.engines import open_engine, why_not
from finelip_fast.engines import torch as engine_module
from finelip_fast.export.to_onnx import export_onnx
from finelip_fast.tokenizer import encode_batch

# Each engine by precision, with the tolerance of its embeddings.
TOLERANCES = {"torch fp32": 1e-5, "torch int8": 5e-2, "onnx fp32": 1e-5, "onnx fp16": 2e-3, "onnx int8": 5e-2}
RUNS = [(1, "torch fp32"), (2, "torch fp32"), (2, "torch int8"), (1, "onnx fp32"), (2, "onnx fp16"), (2, "onnx int8")]
AVAILABLE = [
    pytest.param(version, name, id=f"{name}, version {version}")
    for version, name in RUNS
    if why_not(name.split()[0]) is None
    and not (name.startswith("torch ") and engine_module.why_not(name.split()[1]) is not None)
]
CONTEXT = 24  # of siglip_checkpoint
TEXTS = [
    "a red house",
    "",
    "the red car drives left of two large trees and in front of the blue house",
    "two cars " * 9,
]
PICTURES = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]


@pytest.mark.filterwarnings("ignore::finelip_fast.errors.TruncationWarning")
@pytest.mark.parametrize(("open_clip_siglip", "name"), AVAILABLE, indirect=["open_clip_siglip"])
def test_embeddings_are_the_model_s(siglip_checkpoint: Path, name: str) -> None:
    runtime, precision = name.split()
    if runtime == "onnx":
        export_onnx(siglip_checkpoint, data="scenes:test:8", progress=False, precision=precision)
    engine = open_engine(runtime, siglip_checkpoint, "cpu", precision=precision)
    model, close = finelip_fast.load(siglip_checkpoint), {"atol": TOLERANCES[name], "rtol": 0}
    ids = encode_batch(TEXTS, CONTEXT, tokenizer=model.tokenizer).ids
    with torch.inference_mode():
        texts, pictures = model.encode_text(ids), model.encode_image(model.preprocess.batch(PICTURES))
    torch.testing.assert_close(engine.embed_texts(TEXTS), texts, **close)
    torch.testing.assert_close(engine.embed_images(PICTURES), pictures, **close)
    together, (first, *_) = engine.embed_texts(TEXTS), TEXTS
    torch.testing.assert_close(engine.embed_texts([first])[0], together[0], atol=1e-5, rtol=0)
    assert torch.equal(pickle.loads(pickle.dumps(engine)).embed_texts(TEXTS), together)


def test_speed_is_measured_with_its_own_tokens(siglip_checkpoint: Path) -> None:
    assert open_engine("auto", siglip_checkpoint, "cpu").fingerprint == checkpoints.fingerprint(siglip_checkpoint)


def test_windows_join_a_long_caption(siglip_checkpoint: Path) -> None:
    engine = open_engine("torch", siglip_checkpoint, "cpu")
    windows = encode_batch(TEXTS, CONTEXT, overflow="window", tokenizer=engine.tokenizer)
    rows = windows.ids[windows.owner == len(TEXTS) - 1]
    assert all(
        row[length - 1] == engine.config.end_token for row, length in zip(windows.ids, windows.lengths, strict=True)
    )
    assert len(rows) > 1
    norms = engine.embed_texts(TEXTS, overflow="window").norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
