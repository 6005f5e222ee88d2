"""ONNX Runtime: tensors in and out, from several threads, and errors that say what to do."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finelip_fast.errors import EngineError
from finelip_fast.runtimes import onnx as runtime
from finelip_fast.runtimes.onnx import OnnxGraph, adds_bytes_exactly, session_options

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402

CPU = torch.device("cpu")


def doubling(dtype: int = TensorProto.FLOAT) -> bytes:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "double",
        [helper.make_tensor_value_info("x", dtype, ["batch", 2])],
        [helper.make_tensor_value_info("y", dtype, ["batch", 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()


def test_tensors_go_in_and_come_out() -> None:
    graph = OnnxGraph(doubling(), CPU)
    assert [tuple(port) for port in graph.inputs] == [("x", "tensor(float)", ("batch", 2))]
    x = torch.randn(4, 3)[:, :2]  # not contiguous
    assert torch.equal(graph(x), 2 * x)
    assert torch.equal(graph(x.double()), 2 * x)


def test_a_graph_is_shared_by_threads() -> None:
    graph = OnnxGraph(doubling(), CPU, threads=1)
    batches = [torch.full((n + 1, 2), float(n)) for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for batch, output in zip(batches, pool.map(graph, batches), strict=True):
            assert torch.equal(output, 2 * batch)


def test_threads_are_as_many_as_asked_for() -> None:
    assert session_options(3).intra_op_num_threads == 3
    assert session_options().intra_op_num_threads == torch.get_num_threads()


def test_a_shape_that_does_not_fit_is_told() -> None:
    with pytest.raises(EngineError, match=r"ONNX Runtime failed: InvalidArgument: .*Got invalid dimensions"):
        OnnxGraph(doubling(), CPU)(torch.zeros(1, 3))


def test_a_file_that_cannot_run_is_told(tmp_path: Path) -> None:
    (tmp_path / "image.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"image\.onnx: ONNX Runtime cannot run it on cpu: "):
        OnnxGraph(tmp_path / "image.onnx", CPU)


@pytest.mark.skipif(runtime.has_cuda(), reason="this ONNX Runtime has CUDA")
def test_without_cuda_nothing_falls_back_unasked() -> None:
    with pytest.raises(EngineError, match=r"expected ONNX Runtime with CUDA, got .*pip install onnxruntime-gpu"):
        OnnxGraph(doubling(), torch.device("cuda", 0))


def test_a_session_that_went_to_the_cpu_unasked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    real = runtime.load_onnxruntime()
    fake = SimpleNamespace(
        InferenceSession=Session,
        SessionOptions=real.SessionOptions,
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        __version__="1.99",
    )
    monkeypatch.setattr(runtime, "load_onnxruntime", lambda: fake)
    with pytest.raises(EngineError, match=r"lists CUDA but could not start it: .*onnxruntime-gpu 1\.99"):
        OnnxGraph(doubling(), torch.device("cuda", 0))


def test_without_onnx_runtime_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    runtime.load_onnxruntime.cache_clear()
    try:
        assert "pip install 'finelip-fast[onnx]'" in str(runtime.why_not())
    finally:
        runtime.load_onnxruntime.cache_clear()


def test_products_of_bytes_do_not_saturate() -> None:
    """Without VNNI they do by default."""
    assert adds_bytes_exactly.__wrapped__()


def test_saturating_products_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    real = runtime.load_onnxruntime()

    class Session:
        """A processor that adds pairs of products in 16 bits."""

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def run(self, _: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [np.full((2, 64), 32767 * 32, np.int32)]

    fake = SimpleNamespace(InferenceSession=Session, SessionOptions=real.SessionOptions)
    monkeypatch.setattr(runtime, "load_onnxruntime", lambda: fake)
    assert adds_bytes_exactly.__wrapped__() is False


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and runtime.has_cuda()), reason="needs CUDA in ONNX Runtime")
def test_on_cuda_nothing_leaves_the_gpu() -> None:
    graph = OnnxGraph(doubling(), torch.device("cuda"))
    x = torch.randn(5, 2, device="cuda")
    output = graph(x)
    assert output.device.type == "cuda"
    assert torch.equal(output, 2 * x)
