"""TensorRT plans of a graph: building, messages on progress and failure, and cached timings."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from finelip_fast.errors import EngineError
from finelip_fast.export import graphs
from finelip_fast.export.plans import Builder, build_plan, capability
from finelip_fast.export.precision import in_half
from finelip_fast.export.quantize import calibrated
from finelip_fast.runtimes import trt as runtime

trt = pytest.importorskip("tensorrt_rtx")

ADA = runtime.Machine("tensorrt_rtx", trt.__version__, None, "8.9")
SHAPES = [[(1, 3, 32, 32), (2, 3, 32, 32), (4, 3, 32, 32)]]


@pytest.fixture(scope="module")
def image(protos, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plans") / "image.onnx"
    onnx.save(in_half(protos["image"], "fp16"), path)
    return path


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8-calibrated"])
@pytest.mark.parametrize("compute_capability", ["8.9", "12.0"])
def test_every_precision_builds_for_gpus_that_are_not_here(
    protos, reference, tmp_path: Path, precision: str, compute_capability: str
) -> None:
    proto = protos["text"]
    if precision == "int8-calibrated":
        proto = calibrated(in_half(proto, "fp16"), [{"ids": reference.captions[:8].numpy()}])
    elif precision != "fp32":
        proto = in_half(proto, precision)
    onnx.save(proto, tmp_path / "text.onnx")
    target = ADA._replace(compute_capability=compute_capability)
    plan = build_plan(tmp_path / "text.onnx", [[(1, 1), (4, 20), (16, 40)]], target, Builder(), progress=False)
    assert plan.startswith((b"ftrt", b"vtrt"))
    assert len(plan) > 1_000_000


def test_a_file_that_is_no_graph_says_so(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"broken\.onnx: tensorrt_rtx cannot read it: .*parse"):
        build_plan(tmp_path / "broken.onnx", SHAPES, ADA, Builder(), progress=False)


@pytest.mark.filterwarnings("ignore:Use Deprecated:DeprecationWarning")  # RTX has these calls, but they do nothing
def test_with_tensorrt_what_was_timed_is_kept(image: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """TensorRT for RTX stands in for TensorRT, as their Python interfaces are equal."""
    load, log = runtime.load_module, runtime.logger
    monkeypatch.setattr(runtime, "load_module", lambda _: load("tensorrt_rtx"))
    monkeypatch.setattr(runtime, "logger", lambda _: log("tensorrt_rtx"))
    monkeypatch.setenv("FINELIP_CACHE", str(tmp_path))
    target = runtime.Machine("tensorrt", "10.9", "NVIDIA H100", "9.0")
    for _ in range(2):
        assert build_plan(image, SHAPES, target, Builder(hardware_compatible=True), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["trt-10.9-NVIDIA-H100.timings"]


def test_progress_goes_to_stderr(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_plan(image, SHAPES, ADA, Builder(), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "build, image" in err
    assert "Building engine" in err or "/6" in err


def test_capabilities_have_tensorrts_names() -> None:
    assert capability(trt, "12.0") == trt.ComputeCapability.SM120
    assert capability(trt, "9.0") is None


@pytest.mark.parametrize(("name", "shapes"), [("text", [[(1, 1), (4, 20), (16, 40)]]), ("image", SHAPES)])
def test_siglip_s_graphs_build(make_model, tmp_path: Path, name: str, shapes: list[list[tuple[int, ...]]]) -> None:
    model = make_model(family="siglip", quick_gelu=False, text_positions=16, embed_dim=64, context_length=40)
    onnx.save(in_half(graphs.build(model, name), "fp16"), tmp_path / f"{name}.onnx")
    plan = build_plan(tmp_path / f"{name}.onnx", shapes, ADA, Builder(), progress=False)
    assert plan.startswith((b"ftrt", b"vtrt"))
