"""An exported graph in ONNX Runtime: tensors in, tensors out, on a CPU or a CUDA device."""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from finelip_fast.errors import EngineError

if TYPE_CHECKING:
    import onnxruntime

INSTALL = "pip install 'finelip-fast[onnx]' (on a GPU: onnxruntime-gpu instead of onnxruntime)"

# Precisions whose operations ONNX Runtime has only on a CPU: with CUDA, data would go back and forth.
CPU_ONLY = ("int8", "int8-calibrated")

_CUDA = "CUDAExecutionProvider"
_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(uint8)": torch.uint8,
}


class Port(NamedTuple):
    """An input or output of a graph: its name, its element type, and its axes, with names for free ones."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]


def why_not() -> str | None:
    """Reason why ONNX Runtime cannot run here; None if it can."""
    try:
        load_onnxruntime()
    except EngineError as error:
        return str(error)
    return None


def has_cuda() -> bool:
    """Whether the installed ONNX Runtime was built for CUDA."""
    return _CUDA in load_onnxruntime().get_available_providers()


def session_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """Options of a session: ``threads`` for its products, None for as many as PyTorch uses."""
    options = load_onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    # Otherwise its threads keep spinning for some milliseconds after a run and slow down those of the other graph.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Without VNNI, the faster products of uint8 by int8 saturate at 16 bits; this takes those of uint8 by uint8 there.
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3  # its warnings are about how graphs are written, and no user can change that
    return options


class OnnxGraph:
    """A loaded graph with one output; may be called from several threads at once.

    Args:
        source: The file, or its content.
        device: ``cpu`` or ``cuda``.
        name: Name in messages for a graph given by its content.
        beside: Contents of the files that hold such a graph's weights, by name. No other file is read for it.
        threads: Number of threads on the CPU; None means as many as PyTorch uses.

    Raises:
        EngineError: ONNX Runtime is not installed, has no CUDA, or cannot run this graph on this device.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | bytes,
        device: torch.device,
        *,
        name: str = "the graph",
        beside: Mapping[str, bytes] | None = None,
        threads: int | None = None,
    ) -> None:
        runtime = load_onnxruntime()
        self.device = device
        name = name if isinstance(source, bytes) else Path(source).name
        if device.type == "cuda" and not has_cuda():
            raise EngineError(
                f"{name}: expected ONNX Runtime with CUDA, got {runtime.get_available_providers()}: "
                "pip uninstall onnxruntime, pip install onnxruntime-gpu; or use device='cpu'"
            )
        index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index or 0
        providers: Sequence[Any] = (
            # Products of float32 stay float32: TensorFloat-32 keeps ten bits of them.
            [(_CUDA, {"device_id": index, "use_tf32": 0})] if device.type == "cuda" else ["CPUExecutionProvider"]
        )
        options = session_options(threads)
        # No other format that a file may claim to have is loaded.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        try:
            if beside:
                sizes = [len(content) for content in beside.values()]
                options.add_external_initializers_from_files_in_memory(list(beside), list(beside.values()), sizes)
            self._session = runtime.InferenceSession(
                source if isinstance(source, bytes) else os.fspath(source), options, providers=providers
            )
        except Exception as error:  # every kind of failure has its own class there
            raise EngineError(f"{name}: ONNX Runtime cannot run it on {device}: {_first_line(error)}") from error
        # If CUDA's libraries do not load, ONNX Runtime falls back to the CPU without telling the program.
        if device.type == "cuda" and self._session.get_providers()[0] != _CUDA:
            raise EngineError(
                f"{name}: ONNX Runtime lists CUDA but could not start it: install the CUDA and cuDNN that "
                f"onnxruntime-gpu {runtime.__version__} names, or use device='cpu'"
            )
        self._index = index
        _graphs.add(self)
        self.inputs = [Port(port.name, port.type, tuple(port.shape)) for port in self._session.get_inputs()]
        self.outputs = [Port(port.name, port.type, tuple(port.shape)) for port in self._session.get_outputs()]

    def __call__(self, *arguments: Tensor) -> Tensor:
        """Compute the graph's output for its inputs, in order.

        Raises:
            EngineError: Inputs of a shape that the graph does not take.
        """
        inputs = [x.to(_DTYPES[port.dtype]) for x, port in zip(arguments, self.inputs, strict=True)]
        try:
            return self._on_cuda(inputs) if self.device.type == "cuda" else self._on_cpu(inputs)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed: {_first_line(error)}") from error

    def _on_cpu(self, arguments: list[Tensor]) -> Tensor:
        feed = {port.name: x.cpu().numpy() for port, x in zip(self.inputs, arguments, strict=True)}
        return torch.from_numpy(self._session.run(None, feed)[0])

    def _on_cuda(self, arguments: list[Tensor]) -> Tensor:
        """Run the graph with input and output in the GPU's memory."""
        inputs = [x.to(self.device).contiguous() for x in arguments]
        sizes = {
            axis: size
            for port, x in zip(self.inputs, inputs, strict=True)
            for axis, size in zip(port.axes, x.shape, strict=True)
        }
        output = self.outputs[0]
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in output.axes]
        result = torch.empty(shape, dtype=_DTYPES[output.dtype], device=self.device)
        binding = self._session.io_binding()
        for port, x in zip(self.inputs, inputs, strict=True):
            binding.bind_input(port.name, "cuda", self._index, _numpy_type(x.dtype), list(x.shape), x.data_ptr())
        binding.bind_output(output.name, "cuda", self._index, _numpy_type(result.dtype), shape, result.data_ptr())
        torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime has a stream of its own
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return result


# A session joins its threads when it is deleted; a forked process, which has none of them, would wait forever.
_graphs: weakref.WeakSet[OnnxGraph] = weakref.WeakSet()


def _keep_sessions() -> None:
    for graph in list(_graphs):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(graph._session))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_sessions)


@functools.cache
def adds_bytes_exactly() -> bool:
    """Whether this processor's products of uint8 by int8 are exact in sessions with :func:`session_options`."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    depth, columns = 64, 64
    weight = numpy_helper.from_array(np.full((depth, columns), 127, np.int8), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["rows", "weight"], ["products"])],
        "saturation",
        [helper.make_tensor_value_info("rows", TensorProto.UINT8, [2, depth])],
        [helper.make_tensor_value_info("products", TensorProto.INT32, [2, columns])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = load_onnxruntime().InferenceSession(
        model.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )
    (products,) = session.run(None, {"rows": np.full((2, depth), 255, np.uint8)})
    return bool((products == 255 * 127 * depth).all())


def _numpy_type(dtype: torch.dtype) -> Any:
    return torch.empty(0, dtype=dtype).numpy().dtype.type


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@functools.cache
def load_onnxruntime() -> Any:
    """Import ONNX Runtime. It is imported only here, so that it neither identifies this machine nor reports to its maker.

    Raises:
        EngineError: ONNX Runtime is not installed.
    """
    # Read at import. Otherwise, ONNX Runtime writes a device id and a database of events under ~/.cache/Microsoft, and
    # connects to send them. A value that the user has set is kept.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(f"ONNX Runtime is not installed ({error}): {INSTALL}") from None
    return onnxruntime
