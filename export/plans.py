"""Conversion of ONNX graphs to TensorRT plans, by ``tensorrt`` or ``tensorrt_rtx``."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from finelip_fast._files import cache_folder, read_bytes, write_whole
from finelip_fast.errors import EngineError
from finelip_fast.runtimes import trt as runtime


class Builder(NamedTuple):
    """Options of the builder.

    Args:
        workspace: Largest scratch memory of a layer in MiB; None means as much as there is.
        version_compatible: Whether later versions with the same major number can read the plans, too.
        hardware_compatible: Whether the plans run on every GPU of compute capability 8.0 or more.
        refittable: Whether the plans can take the weights of another checkpoint of the same sizes.
        strip: Whether the plans have no weights and must be refitted before they run.
    """

    workspace: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    refittable: bool = False
    strip: bool = False


def build_plan(
    path: Path,
    shapes: Sequence[Sequence[tuple[int, ...]]],
    target: runtime.Machine,
    builder: Builder,
    *,
    progress: bool = True,
) -> bytes:
    """Build a plan from an ONNX graph with one input.

    Args:
        path: File of the graph.
        shapes: Minimum, optimum and maximum shape of the input, for each optimisation profile.
        target: TensorRT to build with, and GPU to build for.
        builder: Options of the builder.
        progress: Whether to show progress on stderr.

    Raises:
        EngineError: TensorRT cannot read the graph or build it; the message says why.
    """
    trt, log = runtime.load_module(target.module), runtime.logger(target.module)
    log.errors.clear()
    make = trt.Builder(log)
    # From version 11 on, every network is strongly typed: each operation has the precision that the graph gives it.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = make.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(os.fspath(path)):
        errors = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise EngineError(f"{path.name}: {target.module} cannot read it: {errors or log.take()}")
    config = make.create_builder_config()
    for least, best, greatest in shapes:
        profile = make.create_optimization_profile()
        profile.set_shape(network.get_input(0).name, least, best, greatest)
        config.add_optimization_profile(profile)
    _configure(trt, config, target, builder)
    timings = _Timings(trt, config, target)
    with tqdm(desc=f"build, {path.stem}", unit="step", disable=not progress, leave=False) as bar:
        monitor = _monitor(trt, bar) if progress else None
        if monitor:
            config.progress_monitor = monitor
        plan = make.build_serialized_network(network, config)
    if monitor and monitor.stopped:
        raise KeyboardInterrupt
    if plan is None:
        raise EngineError(f"{path.name}: {target.module} {target.version} cannot build it: {log.take()}")
    timings.save()
    return bytes(plan)


def refit_plan(plan: Path, graph: Path, module: str) -> bytes:
    """Create a copy of a plan with the weights of an ONNX graph instead of its own.

    Raises:
        EngineError: TensorRT cannot read the plan, or some of its weights are not in the graph.
    """
    trt, log = runtime.load_module(module), runtime.logger(module)
    engine = runtime.read_plan(plan.read_bytes(), plan.name, module)
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_file(os.fspath(graph)) or not refitter.refit_cuda_engine():
        errors = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise EngineError(f"{plan.name}: {module} cannot give it the weights of {graph.name}: {errors or log.take()}")
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    if (again := getattr(trt.SerializationFlag, "INCLUDE_REFIT", None)) is not None:
        config.set_flag(again)
    return bytes(engine.serialize_with_config(config))


def _configure(trt: Any, config: Any, target: runtime.Machine, builder: Builder) -> None:
    flags = {
        "REFIT": builder.refittable or builder.strip,
        "STRIP_PLAN": builder.strip,
        "VERSION_COMPATIBLE": builder.version_compatible,
    }
    for name, enabled in flags.items():
        if enabled:
            config.set_flag(getattr(trt.BuilderFlag, name))
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 products stay float32, as in PyTorch
    if builder.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, builder.workspace << 20)
    if target.module == "tensorrt":
        if builder.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif not builder.hardware_compatible:  # by default, plans of TensorRT for RTX are for all GPUs from 8.0 on
        config.num_compute_capabilities = 1
        level = capability(trt, target.compute_capability)
        config.set_compute_capability(trt.ComputeCapability.CURRENT if level is None else level, 0)


class _Timings:
    """Timings that TensorRT measured in earlier builds on this GPU; TensorRT for RTX measures none."""

    def __init__(self, trt: Any, config: Any, target: runtime.Machine) -> None:
        self._cache: Any = None
        if target.module == "tensorrt" and hasattr(config, "create_timing_cache"):
            gpu = re.sub(r"\W+", "-", str(target.gpu))
            self._path = cache_folder() / f"trt-{target.version}-{gpu}.timings"
            content = b""
            with contextlib.suppress(EngineError):
                content = read_bytes(self._path, error=EngineError, max_bytes=1 << 28)
            self._cache = config.create_timing_cache(content)
            if not config.set_timing_cache(self._cache, False):  # from another driver, for example
                self._cache = config.create_timing_cache(b"")
                config.set_timing_cache(self._cache, False)

    def save(self) -> None:
        if self._cache is not None:
            content = bytes(self._cache.serialize())
            with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the plan
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self._path, lambda path: path.write_bytes(content))


def _monitor(trt: Any, bar: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Progress in steps of the outermost phase, with the name of the innermost one."""

        def __init__(self) -> None:
            super().__init__()
            self.outermost = ""
            self.stopped = False

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.outermost = name
                bar.reset(total=steps)
            else:
                bar.set_postfix_str(name, refresh=False)
                bar.update(0)

        def step_complete(self, name: str, step: int) -> bool:
            try:
                if name == self.outermost:
                    bar.update()
            except KeyboardInterrupt:  # no exception may pass through TensorRT
                self.stopped = True
            return not self.stopped

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()


def capability(trt: Any, compute_capability: str) -> Any:
    """TensorRT's own constant for a compute capability such as ``"8.9"``; None if it has none."""
    return getattr(trt.ComputeCapability, f"SM{compute_capability.replace('.', '')}", None)
