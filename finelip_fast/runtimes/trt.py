"""A TensorRT plan: tensors in, tensors out, on the kind of GPU that it was built for."""

from __future__ import annotations

import functools
import importlib
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from finelip_fast.errors import EngineError

MODULES = ("tensorrt", "tensorrt_rtx")
INSTALL = "pip install 'finelip-fast[trt]', or on GeForce and RTX cards pip install 'finelip-fast[trt-rtx]'"

# Precision of the ONNX graphs that plans are built from, if its name differs.
ONNX_PRECISION = {"int8": "int8-calibrated"}

GRAPHS = 16  # CUDA graphs that are kept for one stream
_SEEN = 128  # shapes that are remembered as seen once

_DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "INT64": torch.int64, "INT32": torch.int32}

T = TypeVar("T")


# ---- Choice of TensorRT, and the machines that it makes plans for


def why_not() -> str | None:
    """Reason why TensorRT cannot run here; None if it can."""
    if not importable():
        return f"TensorRT is not installed: {INSTALL}"
    if not torch.cuda.is_available():
        return "TensorRT runs on NVIDIA GPUs, and PyTorch finds none here"
    return None


@functools.cache
def importable() -> tuple[str, ...]:
    """The :data:`MODULES` that can be imported, in order of preference."""
    modules = []
    for name in MODULES:
        try:
            load_module(name)
        except EngineError:
            continue
        modules.append(name)
    return tuple(modules)


@functools.cache
def load_module(name: str) -> Any:
    """Import ``tensorrt`` or ``tensorrt_rtx``.

    Raises:
        EngineError: The module cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # the latter if one of its libraries is missing
        raise EngineError(f"{name} cannot be imported ({error}): {INSTALL}") from None


@functools.cache
def logger(name: str) -> Any:
    """The only logger that a TensorRT module accepts in a process; keeps errors in ``errors`` and prints nothing."""
    trt: Any = load_module(name)

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message.strip())

        def take(self) -> str:
            """Return the errors since the last call as one text."""
            errors, self.errors = self.errors, []
            return "; ".join(dict.fromkeys(errors)) or "no reason given"

    return Log()


class Machine(NamedTuple):
    """TensorRT and GPU that a plan is built for: ``compute_capability`` as ``"8.9"``, ``gpu`` None if only that is known."""

    module: str
    version: str
    gpu: str | None
    compute_capability: str


def machine(device: torch.device | str = "cuda", module: str | None = None) -> Machine:
    """A GPU of this machine, with ``module`` if it is installed, otherwise with the one that is.

    Raises:
        EngineError: No TensorRT, or no GPU.
    """
    if (reason := why_not()) is not None:
        raise EngineError(reason)
    name = module if module in importable() else importable()[0]
    major, minor = torch.cuda.get_device_capability(device)
    return Machine(name, load_module(name).__version__, torch.cuda.get_device_name(device), f"{major}.{minor}")


def expected_options(options: Mapping[str, Any], machine: Machine) -> dict[str, Any]:
    """Options that a plan's manifest must have for the plan to run here.

    TensorRT itself only warns if a plan is for another GPU, and cannot read plans of another version. A version-compatible
    plan runs in later versions with the same major number, a hardware-compatible one on every GPU of compute capability 8.0
    or more.

    Args:
        options: Options in the manifest.
        machine: Machine to run on.
    """
    expected: dict[str, Any] = {
        "module": machine.module,
        "version": machine.version,
        "compute_capability": machine.compute_capability,
    }
    if options.get("gpu") is not None:  # None: built for a named compute capability
        expected["gpu"] = machine.gpu
    was, current = _numbers(str(options.get("version"))), _numbers(machine.version)
    if options.get("version_compatible") and was[:1] == current[:1] and was <= current:
        expected["version"] = options["version"]
    if options.get("hardware_compatible") and _numbers(machine.compute_capability) >= (8, 0):
        expected["compute_capability"] = options.get("compute_capability")
        expected.pop("gpu", None)
    return expected


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


# ---- Decisions


def choose_profile(largest: Sequence[int], batch: int) -> int:
    """Number of the smallest optimisation profile, among those with these largest batches, that takes a batch.

    Raises:
        EngineError: No profile takes it.
    """
    fitting = [(size, index) for index, size in enumerate(largest) if size >= batch]
    if not fitting:
        raise EngineError(f"expected a batch of at most {max(largest)}, got {batch}")
    return min(fitting)[1]


class Recent(Generic[T]):
    """Cache of values for keys that occur more than once; the least recently used value is dropped.

    Args:
        most: Number of values to keep.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[Hashable, T] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], T]) -> T | None:
        """Value of ``make`` from the second time that a key occurs; None the first time."""
        if key in self._kept:
            self._kept.move_to_end(key)
        elif key in self._seen:
            self._kept[key] = make()
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        else:
            self._seen[key] = None
            if len(self._seen) > _SEEN:
                self._seen.popitem(last=False)
        return self._kept.get(key)


# ---- Running


def read_plan(content: bytes, name: str, module: str, *, host_code: bool = False) -> Any:
    """Deserialise a plan on the current GPU.

    A plan is machine code, and no check can tell what a stranger's plan would do. A plan passed here must therefore have been
    built by this library, or have the hash in the manifest beside a trusted checkpoint.

    Args:
        content: Content of the plan's file.
        name: Name of the plan in messages.
        module: One of :data:`MODULES`.
        host_code: Whether the plan may bring its own host code, as version-compatible ones do.

    Raises:
        EngineError: TensorRT cannot read the plan here.
    """
    trt, log = load_module(module), logger(module)
    log.errors.clear()
    runtime = trt.Runtime(log)
    if host_code:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise EngineError(f"{name}: {module} {trt.__version__} cannot read it: {log.take()}")
    return engine


class TrtPlan:
    """A loaded plan with one input and one output; may be called from several threads at once.

    Every call takes a stream with its own scratch memory and returns it for the next call: there are as many as calls overlap.

    Args:
        content: Content of the plan's file.
        name: Name of the plan in messages.
        device: A CUDA device.
        module: ``"tensorrt"`` or ``"tensorrt_rtx"``, whichever built the plan. Default: the one that is installed.
        host_code: Whether the plan may bring its own host code, as version-compatible ones do.

    Attributes:
        largest_batch: Largest batch that runs at once; larger ones run in parts.

    Raises:
        EngineError: No TensorRT or no GPU, or TensorRT cannot read the plan here.
    """

    def __init__(
        self,
        content: bytes,
        name: str,
        device: torch.device,
        *,
        module: str | None = None,
        host_code: bool = False,
    ) -> None:
        if (reason := why_not()) is not None:
            raise EngineError(reason)
        self.name = name
        self.module = module or importable()[0]
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        trt = load_module(self.module)
        with torch.cuda.device(self.device):
            self.engine = read_plan(content, name, self.module, host_code=host_code)
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        inputs = [name for name in names if self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        if len(names) != 2 or len(inputs) != 1:
            raise EngineError(f"{self.name}: expected one input and one output, got {names}")
        self.input, (self.output,) = inputs[0], [name for name in names if name not in inputs]
        self.dtype, self._result = (_DTYPES[self.engine.get_tensor_dtype(x).name] for x in (self.input, self.output))
        self._rows = tuple(self.engine.get_tensor_shape(self.output))[1:]
        self._largest: list[int] = [
            self.engine.get_tensor_profile_shape(self.input, profile)[2][0]
            for profile in range(self.engine.num_optimization_profiles)
        ]
        self._idle: queue.LifoQueue[_Lane] = queue.LifoQueue()
        # Contexts are created and graphs captured one at a time: a capture must not overlap another thread's setup.
        self.setup = threading.Lock()

    @property
    def largest_batch(self) -> int:
        return max(self._largest)

    @torch.inference_mode()
    def __call__(self, batch: Tensor) -> Tensor:
        """Encode pixels ``[B, 3, S, S]`` or ids ``[B, T]`` to embeddings ``[B, L, D]``, on the plan's device.

        Raises:
            EngineError: A shape that no optimisation profile takes.
        """
        batch = batch.to(self.device, self.dtype).contiguous()
        result = torch.empty(len(batch), *self._rows, dtype=self._result, device=self.device)
        for part, rows in zip(batch.split(self.largest_batch), result.split(self.largest_batch), strict=True):
            if not len(part):
                continue
            try:
                lane = self._idle.get_nowait()
            except queue.Empty:
                lane = _Lane(self)
            lane.run(part, rows, choose_profile(self._largest, len(part)))
            self._idle.put(lane)  # not after an error: its contexts may no longer be usable
        return result


class _Captured(NamedTuple):
    """A CUDA graph with the memory that it reads and writes, and the context that must not change while it exists."""

    graph: torch.cuda.CUDAGraph
    batch: Tensor
    result: Tensor
    context: Any


class _Lane:
    """A stream and the contexts that run on it in turn, so that they all share the same scratch memory."""

    def __init__(self, plan: TrtPlan) -> None:
        self.plan = plan
        self.stream = torch.cuda.Stream(plan.device)
        self.open: dict[int, Any] = {}  # a context for any shape, by profile
        self.captured: Recent[_Captured] = Recent(GRAPHS)
        # TensorRT for RTX captures graphs itself: only it knows when its kernels for a shape are compiled.
        self.captures_itself = plan.module == "tensorrt_rtx"
        size = 0 if self.captures_itself else max(1, plan.engine.device_memory_size_v2)
        self.scratch = torch.empty(size, dtype=torch.uint8, device=plan.device)

    def run(self, batch: Tensor, result: Tensor, profile: int) -> None:
        """Enqueue the plan; the caller's stream, to which both tensors belong, waits for it."""
        caller = torch.cuda.current_stream(self.plan.device)
        self.stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self.stream):
                captured = None
                if not self.captures_itself:
                    captured = self.captured.get(tuple(batch.shape), lambda: self._capture(batch, result, profile))
                if captured is not None:
                    captured.batch.copy_(batch)
                    captured.graph.replay()
                    result.copy_(captured.result)
                    return
                if profile not in self.open:
                    self.open[profile] = self._context(profile)
                self._enqueue(self.open[profile], batch, result)
        finally:
            caller.wait_stream(self.stream)

    def _capture(self, batch: Tensor, result: Tensor, profile: int) -> _Captured:
        # A separate context: the one that a graph was captured from must not be given another shape.
        context = self._context(profile)
        batch, result = batch.clone(), torch.empty_like(result)
        self._enqueue(context, batch, result)  # so that the setup for a new shape is not captured
        graph = torch.cuda.CUDAGraph()
        with self.plan.setup, torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self._enqueue(context, batch, result)
        return _Captured(graph, batch, result, context)

    def _context(self, profile: int) -> Any:
        engine, trt = self.plan.engine, load_module(self.plan.module)
        with self.plan.setup:
            if self.captures_itself:
                config = engine.create_runtime_config()
                if hasattr(trt, "CudaGraphStrategy"):  # from 1.2 on
                    config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
                context = engine.create_execution_context(config)
            else:
                context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if context is None or not context.set_optimization_profile_async(profile, self.stream.cuda_stream):
                raise EngineError(f"{self.plan.name}: no execution context: {logger(self.plan.module).take()}")
        if not self.captures_itself:
            context.set_device_memory(self.scratch.data_ptr(), self.scratch.numel())
        return context

    def _enqueue(self, context: Any, batch: Tensor, result: Tensor) -> None:
        plan = self.plan
        if not (
            context.set_input_shape(plan.input, tuple(batch.shape))
            and context.set_tensor_address(plan.input, batch.data_ptr())
            and context.set_tensor_address(plan.output, result.data_ptr())
            and context.execute_async_v3(self.stream.cuda_stream)
        ):
            raise EngineError(f"{plan.name}: no result for {tuple(batch.shape)}: {logger(plan.module).take()}")
