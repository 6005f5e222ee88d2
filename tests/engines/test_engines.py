"""Engines: all that run here give the same embeddings in any batch, and describe themselves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import finelip_fast
from finelip_fast.checkpoint import fingerprint
from finelip_fast.engines import ENGINES, Engine, open_engine, why_not
from finelip_fast.engines import torch as engine_module
from finelip_fast.engines.torch import TorchEngine
from finelip_fast.errors import CheckpointError, EngineError, InputError
from finelip_fast.export.to_onnx import export_onnx
from finelip_fast.export.to_trt import export_trt
from finelip_fast.model import FineLIP
from finelip_fast.tokenizer import TruncationWarning, encode_batch

# Each engine by precision, with the tolerance of its embeddings.
ALL = {"torch": (1e-5, {}), "torch bf16": (2e-2, {"precision": "bf16"}), "torch int8": (5e-2, {"precision": "int8"})}
ALL |= {"onnx": (1e-5, {"precision": "fp32"})}
ALL |= {"onnx fp16": (2e-3, {"precision": "fp16"}), "onnx int8": (5e-2, {"precision": "int8"})}
ALL |= {"onnx int8 by threads": (5e-2, {"precision": "int8", "threads": 2})}
ALL |= {"trt": (5e-3, {"precision": "fp16"})}
AVAILABLE = [
    name
    for name in ALL
    if why_not(name.split()[0]) is None
    and not (name.startswith("torch ") and engine_module.why_not(name.split()[1]) is not None)
]
CONTEXT = 24
TEXTS = [
    "a red house",
    "",
    "a blue bus waits beside the tall tree in front of the bakery",
    "a cat",
    "two people with umbrellas walk past a yellow house with a flat roof and a green door",
]
LONG = " ".join(f"the {colour} house has a {colour} door." for colour in ("red", "blue", "green", "white", "black") * 2)
# Tolerance between batches of one engine, at any precision. TensorRT has different kernels for different shapes.
CLOSE = {"atol": 1e-5 if why_not("trt") else 2e-3, "rtol": 0, "check_device": False}


@pytest.fixture(scope="session")
def checkpoint(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "checkpoint"
    finelip_fast.save(make_model(context_length=CONTEXT, embed_dim=128, vision_layers=1, text_width=32), folder)
    for name in AVAILABLE:
        if name.startswith("onnx"):
            export_onnx(folder, data="scenes:test:8", progress=False, precision=ALL[name][1]["precision"])
    if "trt" in AVAILABLE:
        export_trt(folder, data="scenes:test:8", progress=False)
    return folder


@pytest.fixture(scope="session", params=AVAILABLE)
def engine(request: pytest.FixtureRequest, checkpoint: Path) -> Engine:
    name = request.param.split()[0]
    return open_engine(name, checkpoint, "cuda" if name == "trt" else "cpu", **ALL[request.param][1])


@pytest.fixture
def tolerance(request: pytest.FixtureRequest) -> float:
    return ALL[request.node.callspec.params["engine"]][0]


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40, 32 + 8 * n, 3), np.uint8)) for n in range(5)]


def test_embeddings_are_those_of_the_model(
    engine: Engine, checkpoint: Path, pictures: list[Image.Image], tolerance: float
) -> None:
    model = finelip_fast.load(checkpoint)
    with torch.no_grad():
        images = model.encode_image(model.preprocess.batch(pictures))
        texts = model.encode_text(finelip_fast.tokenize(TEXTS, CONTEXT))
    torch.testing.assert_close(engine.embed_images(pictures), images, atol=tolerance, rtol=0, check_device=False)
    torch.testing.assert_close(engine.embed_texts(TEXTS), texts, atol=tolerance, rtol=0, check_device=False)


def test_rows_are_of_unit_length(engine: Engine, pictures: list[Image.Image]) -> None:
    for embeddings in (engine.embed_images(pictures), engine.embed_texts(TEXTS)):
        assert embeddings.shape == (5, engine.config.tokens, engine.config.embed_dim)
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(embeddings.shape[:2]), **CLOSE)


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(5)), batch_size=st.integers(1, 6))
def test_company_and_order_change_nothing(
    engine: Engine, pictures: list[Image.Image], order: list[int], batch_size: int
) -> None:
    images = engine.embed_images((pictures[n] for n in order), batch_size=batch_size)
    torch.testing.assert_close(images, torch.cat([engine.embed_images([pictures[n]]) for n in order]), **CLOSE)
    texts = engine.embed_texts([TEXTS[n] for n in order], batch_size=batch_size)
    torch.testing.assert_close(texts, torch.cat([engine.embed_texts([TEXTS[n]]) for n in order]), **CLOSE)


def test_nothing_gives_nothing(engine: Engine) -> None:
    side, shape = engine.config.image_size, (0, engine.config.tokens, engine.config.embed_dim)
    assert engine.encode_image(torch.zeros(0, 3, side, side)).shape == shape
    assert engine.encode_text(torch.zeros(0, 5, dtype=torch.int64)).shape == shape


def test_padding_alone_gives_zeros(engine: Engine) -> None:
    ids = torch.cat([finelip_fast.tokenize(TEXTS[:1], CONTEXT), torch.zeros(1, CONTEXT, dtype=torch.int64)])
    assert not engine.encode_text(ids)[1].any()
    assert not engine.encode_text(ids[1:]).any()


@pytest.mark.parametrize("shape", [(1, 3, 31, 32), (3, 32, 32), (1, 1, 32, 32)])
def test_pixels_of_another_shape_are_refused(engine: Engine, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected pixels \[B, 3, 32, 32\]"):
        engine.encode_image(torch.zeros(shape))


def test_pixels_are_normalised_numbers(engine: Engine) -> None:
    with pytest.raises(InputError, match=r"expected normalised pixels of a floating dtype, got torch\.uint8"):
        engine.encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    torch.testing.assert_close(
        engine.encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.float64)),
        engine.encode_image(torch.zeros(1, 3, 32, 32)),
    )


@pytest.mark.parametrize("number", [-1, 60_000])
def test_ids_outside_the_vocabulary_are_refused(engine: Engine, number: int) -> None:
    with pytest.raises(InputError, match=f"expected ids from 0 to 49407, got {number}; use the tokenizer of the model"):
        engine.encode_text(torch.tensor([[1, number]]))


@pytest.mark.parametrize(
    "ids", [torch.zeros(5), torch.zeros(1, CONTEXT + 1, dtype=torch.int64), torch.zeros(1, 5), "a man", [[1]]]
)
def test_ids_that_are_none_are_refused(engine: Engine, ids: torch.Tensor) -> None:
    with pytest.raises(InputError, match=rf"expected integer ids \[B, T\] with T in 1\.\.{CONTEXT}"):
        engine.encode_text(ids)


def test_threads_share_an_engine(engine: Engine, pictures: list[Image.Image]) -> None:
    images, texts = engine.embed_images(pictures), engine.embed_texts(TEXTS)

    def encode_alone(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = number % len(pictures)
        return engine.embed_images([pictures[index]])[0] - images[index], engine.embed_texts([TEXTS[index]])[0] - texts[
            index
        ]

    with ThreadPoolExecutor(4) as pool:
        for differences in pool.map(encode_alone, range(40)):
            assert max(difference.abs().max() for difference in differences) <= CLOSE["atol"]


def test_padding_changes_nothing(engine: Engine) -> None:
    ids = finelip_fast.tokenize(TEXTS[:2], CONTEXT)
    torch.testing.assert_close(engine.encode_text(ids), engine.encode_text(ids[:, :6]), **CLOSE)


def test_a_shorter_context_cuts_there(engine: Engine) -> None:
    assert encode_batch(TEXTS[:1], CONTEXT).lengths == 5
    torch.testing.assert_close(engine.embed_texts(TEXTS[:1], context_length=5), engine.embed_texts(TEXTS[:1]), **CLOSE)
    with pytest.warns(TruncationWarning, match="1 of 2 texts exceeded 4 tokens"):
        cut = engine.embed_texts(["a red house", "a red"], context_length=4)
    torch.testing.assert_close(cut[0], cut[1], **CLOSE)


@pytest.mark.parametrize("context_length", [0, 2, CONTEXT + 1])
def test_a_context_that_cannot_be_is_refused(engine: Engine, context_length: int) -> None:
    with pytest.raises(InputError, match=f"expected .*{max(3, min(context_length, CONTEXT))}"):
        engine.embed_texts(["a red house"], context_length=context_length)


def test_longer_texts_are_refused_or_cut_or_windowed(engine: Engine) -> None:
    uncut = encode_batch([LONG], 1000)
    assert uncut.lengths > 2 * CONTEXT
    with pytest.raises(InputError, match=f"expected texts of at most {CONTEXT} tokens, got {int(uncut.lengths)}"):
        engine.embed_texts([LONG], overflow="error")
    with pytest.warns(TruncationWarning, match=f"exceeded {CONTEXT} tokens"):
        cut = engine.embed_texts([LONG])
    windowed = engine.embed_texts(["a cat", LONG, ""], overflow="window", batch_size=2)
    assert windowed.shape[0] == 3
    torch.testing.assert_close(windowed.norm(dim=-1), torch.ones(windowed.shape[:2]), **CLOSE)
    torch.testing.assert_close(windowed[[0, 2]], engine.embed_texts(["a cat", ""]), **CLOSE)
    assert not torch.allclose(windowed[1], cut[0], atol=1e-3)

    windows = encode_batch([LONG], CONTEXT, overflow="window").ids
    mean = torch.nn.functional.normalize(engine.encode_text(windows).sum(0), dim=-1)
    torch.testing.assert_close(windowed[1], mean, **CLOSE)


def test_an_engine_says_what_it_is(engine: Engine, checkpoint: Path) -> None:
    assert engine.name in ENGINES
    assert str(engine) == f"{engine.name}: {engine.description} (asked for)"
    assert engine.source == str(checkpoint)
    assert engine.fingerprint == fingerprint(checkpoint)
    assert engine.alpha == 0.8
    assert engine.device.type == ("cuda" if engine.name == "trt" else "cpu")
    assert repr(engine) == f"<{type(engine).__name__} {engine}>"
    assert (engine.export is None) == (engine.name == "torch")


def test_an_engine_opens_again_by_its_settings(engine: Engine) -> None:
    again = open_engine(**engine.settings)
    assert (str(again), again.fingerprint, again.settings) == (str(engine), engine.fingerprint, engine.settings)


def test_an_engine_gives_its_model(engine: Engine) -> None:
    model = engine.load_model()
    assert fingerprint(model) == engine.fingerprint
    assert not model.training


def test_an_exported_engine_needs_no_model(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine.export is None:
        pytest.skip("runs the model itself")
    monkeypatch.setattr(FineLIP, "load_state_dict", lambda *_, **__: pytest.fail("the model was built"))
    assert open_engine(**engine.settings).fingerprint == engine.fingerprint


def test_auto_says_why(checkpoint: Path) -> None:
    engine = open_engine("auto", checkpoint, "cpu")
    assert engine.name in ENGINES
    assert engine.reason
    assert engine.reason != "asked for"
    assert engine.reason in str(engine)


def test_a_relative_source_is_kept_absolute(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    assert open_engine("torch", checkpoint.name, "cpu").source == str(checkpoint)


@pytest.mark.parametrize("name", [name for name in ENGINES if why_not(name) is not None])
def test_an_engine_that_cannot_run_says_what_to_do(name: str, checkpoint: Path) -> None:
    with pytest.raises(EngineError, match=f"engine='{name}' cannot run: .*alternatively, use engine='torch'"):
        open_engine(name, checkpoint)


def test_an_unknown_engine_is_refused(checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"expected engine to be one of .*torch.*, got 'jax'"):
        open_engine("jax", checkpoint)


@pytest.mark.parametrize(("device", "error"), [("gpu", InputError), ("cuda:99", EngineError)])
def test_a_device_that_is_not_here_is_refused(device: str, error: type[Exception], checkpoint: Path) -> None:
    with pytest.raises(error, match=f"device='{device}' cannot be used: .*use device='cpu'"):
        open_engine("torch", checkpoint, device)


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing: no such file or folder"):
        open_engine("auto", tmp_path / "nothing")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_agrees_with_the_cpu(checkpoint: Path, pictures: list[Image.Image]) -> None:
    cpu_engine, gpu_engine = open_engine("torch", checkpoint, "cpu"), open_engine("torch", checkpoint)
    assert gpu_engine.device.type == "cuda"
    assert gpu_engine.fingerprint == cpu_engine.fingerprint
    for cpu_embeddings, gpu_embeddings in (
        (cpu_engine.embed_images(pictures), gpu_engine.embed_images(pictures)),
        (cpu_engine.embed_texts(TEXTS), gpu_engine.embed_texts(TEXTS)),
    ):
        assert (cpu_embeddings * gpu_embeddings.float().cpu()).sum(-1).min() > 0.999


def test_the_gpu_of_an_apple_machine_is_chosen_only_where_it_computes_the_same(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    plain = TorchEngine(checkpoint)  # there is no such GPU here, so every attempt fails
    assert str(plain).startswith("torch: cpu, float32; the GPU failed a trial")
    monkeypatch.setattr(engine_module, "_apple_gpu", lambda model: torch.device("cpu"))
    chosen = TorchEngine(checkpoint)
    pixels = torch.zeros(1, 3, chosen.config.image_size, chosen.config.image_size)
    torch.testing.assert_close(chosen.encode_image(pixels), plain.encode_image(pixels), atol=1e-5, rtol=0)
    assert chosen.load_model() is not chosen.model, "explanations are computed on the CPU"
    assert TorchEngine(checkpoint, "cpu").load_model().device.type == "cpu"
