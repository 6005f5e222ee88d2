"""Running TensorRT plans: decisions that need no GPU, and the plans themselves on a GPU."""

from __future__ import annotations

import concurrent.futures
import importlib
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finelip_fast.errors import EngineError
from finelip_fast.runtimes import trt as runtime
from finelip_fast.runtimes.trt import Machine, Recent, TrtPlan, choose_profile, expected_options

HERE = Machine("tensorrt", "10.9.0.34", "NVIDIA H100", "9.0")


@given(largest=st.lists(st.integers(1, 128), min_size=1, max_size=4), batch=st.integers(1, 130))
def test_the_smallest_profile_that_fits_is_chosen(largest: list[int], batch: int) -> None:
    if batch > max(largest):
        with pytest.raises(EngineError, match=f"expected a batch of at most {max(largest)}, got {batch}"):
            choose_profile(largest, batch)
    else:
        chosen = largest[choose_profile(largest, batch)]
        assert batch <= chosen
        assert not any(batch <= size < chosen for size in largest)


def test_what_comes_twice_is_made_once_and_the_least_recently_used_goes() -> None:
    misses = []
    recent: Recent[str] = Recent(2)

    def get(key: str) -> str | None:
        return recent.get(key, lambda: misses.append(key) or key.upper())

    assert [get("a"), get("a"), get("a")] == [None, "A", "A"]
    assert [get("b"), get("b"), get("c")] == [None, "B", None]
    assert get("a") == "A"
    assert get("c") == "C"  # replaces b
    assert len(recent) == 2
    assert get("a") == "A"
    assert misses == ["a", "b", "c"]
    assert get("b") == "B"
    assert misses == ["a", "b", "c", "b"]


def test_what_cannot_be_made_is_tried_again() -> None:
    recent: Recent[int] = Recent(2)
    recent.get("a", int)
    with pytest.raises(ZeroDivisionError):
        recent.get("a", lambda: 1 // 0)
    assert recent.get("a", lambda: 7) == 7


@given(st.lists(st.integers(0, 400), max_size=1000))
def test_what_is_remembered_is_bounded(keys: list[int]) -> None:
    recent: Recent[int] = Recent(16)
    for key in keys:
        assert recent.get(key, lambda key=key: key) in (None, key)
    assert len(recent) <= 16
    assert len(recent._seen) <= 128


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"gpu": "NVIDIA L4"}, {"gpu": "NVIDIA H100"}),
        ({"gpu": None}, {}),
        ({"version_compatible": True, "version": "10.3.0.26"}, {"version": "10.3.0.26"}),
        ({"version_compatible": True, "version": "10.10.0.1"}, {}),  # later than the installed version
        ({"version_compatible": True, "version": "8.6.1"}, {}),
        ({"version_compatible": False, "version": "10.3.0.26"}, {}),
        ({"hardware_compatible": True, "gpu": "NVIDIA L4", "compute_capability": "8.9"}, {"compute_capability": "8.9"}),
    ],
)
def test_what_a_plan_must_be_to_run_here(options: dict[str, object], expected: dict[str, object]) -> None:
    exact = {"module": "tensorrt", "version": "10.9.0.34", "compute_capability": "9.0"}
    assert expected_options(options, HERE) == exact | expected


def test_hardware_compatible_plans_need_ampere() -> None:
    options = {"hardware_compatible": True, "gpu": "NVIDIA A100", "compute_capability": "8.0"}
    turing = HERE._replace(gpu="NVIDIA T4", compute_capability="7.5")
    assert expected_options(options, turing)["compute_capability"] == "7.5"
    assert expected_options(options, turing)["gpu"] == "NVIDIA T4"


def test_reasons_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runtime, "importable", lambda: ("tensorrt",))
    assert runtime.why_not() == "TensorRT runs on NVIDIA GPUs, and PyTorch finds none here"
    with pytest.raises(EngineError, match="PyTorch finds none"):
        TrtPlan(b"", "image.plan", torch.device("cuda"))
    with pytest.raises(EngineError, match="PyTorch finds none"):
        runtime.machine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert runtime.why_not() is None
    monkeypatch.setattr(runtime, "importable", lambda: ())
    assert str(runtime.why_not()).startswith("TensorRT is not installed: pip install 'finelip-fast[trt]'")


def test_a_module_that_cannot_be_imported_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("libnvinfer.so: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(EngineError, match=r"tensorrt cannot be imported \(libnvinfer.*pip install"):
        runtime.load_module.__wrapped__("tensorrt")
    runtime.load_module.cache_clear()
    try:
        assert runtime.importable.__wrapped__() == ()
    finally:
        runtime.load_module.cache_clear()


def test_the_one_here_is_taken_or_the_one_that_built_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(runtime, "load_module", lambda name: type("M", (), {"__version__": f"{name} 1"}))
    monkeypatch.setattr(runtime, "importable", lambda: ("tensorrt", "tensorrt_rtx"))
    assert runtime.machine() == Machine("tensorrt", "tensorrt 1", "NVIDIA L4", "8.9")
    assert runtime.machine(module="tensorrt_rtx").module == "tensorrt_rtx"
    monkeypatch.setattr(runtime, "importable", lambda: ("tensorrt",))
    assert runtime.machine(module="tensorrt_rtx").module == "tensorrt"


def test_a_file_that_is_no_plan_is_refused() -> None:
    module = pytest.importorskip("tensorrt_rtx")
    with pytest.raises(EngineError, match=rf"image\.plan: tensorrt_rtx {module.__version__} cannot read it: .+"):
        runtime.read_plan(b"no plan", "image.plan", "tensorrt_rtx")


def test_what_is_called_is_there() -> None:
    """All TensorRT functions that the runner uses exist; calling them needs a GPU."""
    trt = pytest.importorskip("tensorrt_rtx")
    engine = "num_io_tensors get_tensor_name get_tensor_mode get_tensor_dtype get_tensor_shape get_tensor_profile_shape"
    engine += " num_optimization_profiles device_memory_size_v2 create_runtime_config create_execution_context"
    context = "set_optimization_profile_async set_device_memory set_input_shape set_tensor_address execute_async_v3"
    refitting = "create_serialization_config serialize_with_config"
    for kind, names in [
        (trt.Runtime, "engine_host_code_allowed deserialize_cuda_engine"),
        (trt.ICudaEngine, f"{engine} {refitting}"),
        (trt.IExecutionContext, context),
        (trt.IRuntimeConfig, "cuda_graph_strategy"),
        (trt.CudaGraphStrategy, "WHOLE_GRAPH_CAPTURE"),
        (trt.ExecutionContextAllocationStrategy, "USER_MANAGED"),
        (trt.TensorIOMode, "INPUT"),
        (trt.DataType, "FLOAT HALF INT64 INT32"),
        (trt.Refitter, "refit_cuda_engine"),
        (trt.OnnxParserRefitter, "refit_from_file num_errors get_error"),
        (trt.ISerializationConfig, "set_flag clear_flag"),
        (trt.SerializationFlag, "EXCLUDE_WEIGHTS INCLUDE_REFIT"),
    ]:
        assert [name for name in names.split() if not hasattr(kind, name)] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not runtime.importable(), reason="needs a GPU and TensorRT")
@pytest.mark.parametrize("module", runtime.MODULES)
def test_on_a_gpu_plans_give_the_models_embeddings(make_model, make_captions, tmp_path: Path, module: str) -> None:
    """The plans run repeatedly, in any batch, on any stream and from several threads, also when graphs are replayed."""
    if module not in runtime.importable():
        pytest.skip(f"{module} is not installed")
    from finelip_fast.export import graphs, to_trt

    context = 64
    model = make_model(context_length=context)
    onnx.save(graphs.build(model, "text"), tmp_path / "text.onnx")
    shapes = to_trt.input_shapes("text", model.config, [(1, 1, 1), (1, 4, 16)])
    target = runtime.machine(module=module)
    plan = to_trt.build_plan(tmp_path / "text.onnx", shapes, target, to_trt.Builder(), progress=False)
    run = TrtPlan(plan, "text.plan", torch.device("cuda"), module=module)
    assert run.largest_batch == 16
    batches = [make_captions([context] * size, context, seed=size) for size in (1, 2, 16, 40)]
    batches += [ids[:, :32] for ids in batches]
    with torch.no_grad():
        expected = [model.encode_text(ids) for ids in batches]

    def check(number: int) -> None:
        ids, embeddings = batches[number], expected[number]
        torch.testing.assert_close(run(ids).cpu(), embeddings, atol=5e-5, rtol=0)

    for _ in range(4):
        for number in range(len(batches)):
            check(number)
    outputs = [run(batches[0]) for _ in range(3)]
    run(batches[0].flip(1))
    for output in outputs:  # not overwritten by later calls
        torch.testing.assert_close(output.cpu(), expected[0], atol=5e-5, rtol=0)
    with torch.cuda.stream(torch.cuda.Stream()):
        check(1)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(check, [number for _ in range(10) for number in range(len(batches))]))
    assert run(batches[0][:0]).shape == (0, model.config.tokens, model.config.embed_dim)
