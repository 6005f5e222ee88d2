"""The TensorRT engine: real plans for two GPUs that are not present are refused for any mismatch, by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

import finelip_fast
from finelip_fast import checkpoint as checkpoints
from finelip_fast._files import file_hash
from finelip_fast.engines import trt as engine
from finelip_fast.engines.trt import TrtEngine
from finelip_fast.errors import EngineError
from finelip_fast.export import graphs, precision, to_onnx
from finelip_fast.export.to_trt import Builder, export_trt
from finelip_fast.runtimes import trt as runtime
from finelip_fast.runtimes.manifest import Export, Manifest, exports_folder, read

CONTEXT = 48
ADA = runtime.Machine("tensorrt_rtx", "", "NVIDIA GeForce RTX 4090", "8.9")
BLACKWELL = ADA._replace(gpu="NVIDIA GeForce RTX 5090", compute_capability="12.0")

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not runtime.importable(), reason="needs a GPU and TensorRT for it"
)


@pytest.fixture(scope="module")
def model(make_model) -> finelip_fast.FineLIP:
    return make_model(context_length=CONTEXT, vision_layers=1, text_layers=1, text_width=32)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trt") / "checkpoint"
    finelip_fast.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def plans(checkpoint, model) -> dict[str, Export]:
    """Plans by compute capability; marked as proven, which is impossible here."""
    pytest.importorskip("tensorrt_rtx")
    folder = exports_folder(checkpoint) / "onnx-fp16"
    folder.mkdir(parents=True)
    for name in ("image", "text"):
        onnx.save(precision.in_half(graphs.build(model, name), "fp16"), folder / f"{name}.onnx")
    files = {path.name: file_hash(path) for path in folder.iterdir()}
    Manifest("onnx", "fp16", checkpoints.fingerprint(model), model.config.to_dict(), files, {}).write(folder)
    exports = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "export_onnx", lambda *_, **__: folder)
        for capability in ("8.9", "12.0"):
            path = export_trt(checkpoint, compute_capability=capability, progress=False)
            dataclasses.replace(read(path).manifest, proof={"passed": True}).write(path)
            exports[capability] = read(path)
    return exports


class Plan:
    """Stand-in for a plan that TensorRT can only load on its GPU."""

    largest_batch = 16

    def __init__(self, content: bytes, name: str, device: torch.device, *, module: str, host_code: bool) -> None:
        self.content, self.module, self.host_code = content, module, host_code
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, batch: Tensor) -> Tensor:
        self.shapes.append(tuple(batch.shape))
        return torch.zeros(len(batch), 4, 48)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes the engine believe that this machine has a GPU."""

    def be(machine: runtime.Machine) -> None:
        module = pytest.importorskip("tensorrt_rtx")
        machine_with_version = machine if machine.version else machine._replace(version=module.__version__)
        monkeypatch.setattr(runtime, "why_not", lambda: None)
        monkeypatch.setattr(runtime, "machine", lambda device, module: machine_with_version)
        monkeypatch.setattr(engine, "find_device", lambda device: torch.device(device or "cuda"))
        monkeypatch.setattr(engine, "TrtPlan", Plan)

    return be


@pytest.mark.parametrize(("capability", "machine"), [("8.9", ADA), ("12.0", BLACKWELL)])
def test_plans_that_fit_are_loaded(on, plans, checkpoint: Path, capability: str, machine: runtime.Machine) -> None:
    on(machine)
    opened = TrtEngine(checkpoint, plans[capability])
    assert str(opened) == f"trt: {machine.gpu}, fp16, latency (asked for)"
    assert opened.device == torch.device("cuda")
    assert opened.fingerprint == checkpoints.fingerprint(checkpoint)
    for name, plan in (("image", opened._image), ("text", opened._text)):
        assert isinstance(plan, Plan)
        assert plan.content == (plans[capability].folder / f"{name}.plan").read_bytes()
        assert (plan.module, plan.host_code) == ("tensorrt_rtx", False)


def test_batches_and_texts_are_cut_to_what_plans_take(on, plans, checkpoint: Path, make_captions) -> None:
    on(ADA)
    opened = TrtEngine(checkpoint, plans["8.9"])
    assert opened.encode_image(torch.zeros(40, 3, 32, 32)).shape == (40, 4, 48)
    assert opened._image.shapes == [(16, 3, 32, 32), (16, 3, 32, 32), (8, 3, 32, 32)]
    opened.encode_text(make_captions([3], CONTEXT))
    opened.encode_text(make_captions([33, 5], CONTEXT))
    assert opened._text.shapes == [(1, 32), (2, CONTEXT)]  # multiples of 32, so that few shapes occur


def test_a_wrong_gpu_is_refused(on, plans, checkpoint: Path) -> None:
    on(BLACKWELL)
    with pytest.raises(
        EngineError, match=r"compute_capability: made for '8\.9', here it is '12\.0'.*Export it again: finelip"
    ):
        TrtEngine(checkpoint, plans["8.9"])
    on(ADA)
    with pytest.raises(
        EngineError, match=r"compute_capability: made for '12\.0', here it is '8\.9'.*Export it again: finelip"
    ):
        TrtEngine(checkpoint, plans["12.0"])
    # Plans that were built on a GPU are for GPUs of that name.
    manifest = plans["8.9"].manifest
    built_there = dataclasses.replace(manifest, options={**manifest.options, "gpu": "NVIDIA L4"})
    with pytest.raises(EngineError, match="gpu: made for 'NVIDIA L4', here it is 'NVIDIA GeForce RTX 4090'"):
        TrtEngine(checkpoint, Export(plans["8.9"].folder, built_there))


def test_a_wrong_version_is_refused(on, plans, checkpoint: Path) -> None:
    on(ADA._replace(version="1.6.0.25"))
    version = plans["8.9"].manifest.options["version"]
    with pytest.raises(
        EngineError, match=rf"version: made for '{version}', here it is '1\.6\.0\.25'.*finelip export trt"
    ):
        TrtEngine(checkpoint, plans["8.9"])
    on(ADA._replace(module="tensorrt", version="10.9.0.34"))
    with pytest.raises(EngineError, match="module: made for 'tensorrt_rtx', here it is 'tensorrt'; version: "):
        TrtEngine(checkpoint, plans["8.9"])


def test_a_wrong_checkpoint_is_refused(on, plans, make_model, tmp_path: Path) -> None:
    on(ADA)
    other_checkpoint = tmp_path / "other"
    finelip_fast.save(
        make_model(seed=1, context_length=CONTEXT, vision_layers=1, text_layers=1, text_width=32), other_checkpoint
    )
    source, current = (plans["8.9"].manifest.checkpoint[:12], checkpoints.fingerprint(other_checkpoint)[:12])
    with pytest.raises(
        EngineError,
        match=rf"checkpoint: made from {source}…, this one is {current}….*finelip export trt {other_checkpoint}",
    ):
        TrtEngine(other_checkpoint, plans["8.9"])


def test_a_changed_plan_is_refused(on, plans, checkpoint: Path, tmp_path: Path) -> None:
    on(ADA)
    for path in plans["8.9"].folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "text.plan").write_bytes(b"other")
    with pytest.raises(EngineError, match=r"text\.plan: not the file that was proven"):
        TrtEngine(checkpoint, read(tmp_path))


def test_plans_of_other_graphs_are_refused(on, plans, checkpoint: Path) -> None:
    """The graphs have been exported again since."""
    on(ADA)
    manifest = plans["8.9"].manifest
    older = {**manifest.options, "onnx": dict.fromkeys(manifest.options["onnx"], "0" * 64)}
    with pytest.raises(EngineError, match=r"onnx: made for \{'image\.onnx': '000.*Export it again: finelip export trt"):
        TrtEngine(checkpoint, Export(plans["8.9"].folder, dataclasses.replace(manifest, options=older)))


def test_an_unproven_plan_is_refused_with_what_proves_it(on, plans, checkpoint: Path) -> None:
    unproven = Export(plans["8.9"].folder, dataclasses.replace(plans["8.9"].manifest, proof={}))
    on(ADA)
    command = rf"finelip export trt {checkpoint} --precision fp16 --prove --out {plans['8.9'].folder}$"
    with pytest.raises(
        EngineError, match=rf"cannot be used: it was never compared with the model\. Compare it here: {command}"
    ):
        TrtEngine(checkpoint, unproven)
    on(BLACKWELL)  # a proof is impossible there
    with pytest.raises(
        EngineError, match=r"compute_capability: .*proof: it was never.*Export it again: .*--precision fp16 --again$"
    ):
        TrtEngine(checkpoint, unproven)


def test_other_devices_are_refused(on, plans, checkpoint: Path) -> None:
    on(ADA)
    with pytest.raises(EngineError, match="expected a CUDA device for engine='trt', got 'cpu'"):
        TrtEngine(checkpoint, plans["8.9"], "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_told(plans, checkpoint: Path) -> None:
    with pytest.raises(EngineError, match=r"engine='trt' cannot run: TensorRT runs on NVIDIA GPUs.*use engine='torch'"):
        TrtEngine(checkpoint, plans["8.9"])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "int8"])
def test_on_a_gpu_the_engine_gives_the_models_embeddings(model, make_captions, tmp_path: Path, name: str) -> None:
    finelip_fast.save(model, tmp_path)
    folder = export_trt(tmp_path, precision=name, data="scenes:test:8", progress=False)
    opened = TrtEngine(tmp_path, read(folder))
    ids = make_captions([3, CONTEXT, 0, 20] * 10, CONTEXT)
    pixels = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    least = {"fp32": 0.99999, "fp16": 0.9999, "bf16": 0.998, "int8": 0.97}[name]
    with torch.no_grad():
        for embeddings, expected in [
            (opened.encode_image(pixels), model.encode_image(pixels)),
            (opened.encode_text(ids)[[0, 1, 3]], model.encode_text(ids)[[0, 1, 3]]),
        ]:
            assert torch.cosine_similarity(embeddings.cpu(), expected, dim=-1).min() > least


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("strip", [False, True])
def test_on_a_gpu_refitted_plans_are_the_other_model(make_model, tmp_path: Path, strip: bool) -> None:
    sizes = {"context_length": CONTEXT, "vision_layers": 1, "text_layers": 1, "text_width": 32}
    for seed in range(2):
        finelip_fast.save(make_model(seed=seed, **sizes), tmp_path / str(seed))
    arguments = {"data": "scenes:test:8", "progress": False}
    old = export_trt(tmp_path / "0", builder=Builder(refittable=True, strip=strip), **arguments)
    new = export_trt(tmp_path / "1", refit=old, **arguments)
    assert read(new).manifest.proven
    TrtEngine(tmp_path / "1", read(new))
