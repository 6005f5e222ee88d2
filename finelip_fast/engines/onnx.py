"""The ONNX Runtime engine: exported graphs on a CPU or a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from finelip_fast._arguments import find_device
from finelip_fast.engines.exported import ExportedEngine
from finelip_fast.errors import EngineError
from finelip_fast.runtimes import graph
from finelip_fast.runtimes.manifest import Export, rebuild_command
from finelip_fast.runtimes.onnx import CPU_ONLY, OnnxGraph, adds_bytes_exactly, has_cuda
from finelip_fast.runtimes.parallel import RowParallel


class OnnxEngine(ExportedEngine):
    """Graphs that ``finelip export onnx`` wrote and proved.

    Args:
        checkpoint: Folder, file or name, as :func:`finelip_fast.load` takes it.
        export: Graphs to run; see :func:`finelip_fast.runtimes.manifest.find`.
        device: Device to run on; None means a GPU if there is one and ONNX Runtime was built for it.
        threads: Number of threads on the CPU; None means as many as PyTorch uses.
        reason: Reason why this engine was chosen.

    Raises:
        EngineError: The files do not fit the checkpoint, were not proven, or cannot run here.
        CheckpointError: A checkpoint that cannot be loaded.
    """

    name = "onnx"

    def __init__(
        self,
        checkpoint: str | PathLike[str] | None,
        export: Export,
        device: str | torch.device | None = None,
        threads: int | None = None,
        *,
        reason: str = "asked for",
    ) -> None:
        super().__init__(checkpoint, export, _device(device), reason=reason)
        precision = export.manifest.precision
        kind = self.device.type
        if kind == "cuda" and precision in CPU_ONLY:
            raise EngineError(f"ONNX Runtime supports {precision} only on the CPU; on a GPU use fp16, or engine='trt'")
        if kind not in export.manifest.proof.get("devices", ()):
            command = rebuild_command(checkpoint, "onnx", precision, ["--again"])
            raise EngineError(f"{export.folder} was not proven on {kind}; export it again on this machine: {command}")
        if precision == "bf16" and self.device.type == "cpu":
            raise EngineError("ONNX Runtime cannot multiply in bfloat16 on a CPU; use another precision")
        if precision == "int8" and self.device.type == "cpu" and not adds_bytes_exactly():
            raise EngineError(
                "8-bit products saturate on this processor, so int8 embeddings would be wrong; use another precision"
            )
        if self.device.type == "cuda":
            self._positions_at_once = 32
        self._threads = threads
        self._open_graphs()
        self.description = f"{self.device}, {precision}"

    def _opened_with(self) -> tuple[Any, ...]:
        return *super()._opened_with(), self._threads

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "threads": self._threads}

    def _follow_fork(self) -> None:
        self._open_graphs()

    def _open_graphs(self) -> None:
        with ThreadPoolExecutor() as pool:  # reading, hashing and ONNX Runtime release the interpreter's lock
            self._image, self._text = pool.map(self._graph, ("image", "text"))

    def _graph(self, name: str) -> Callable[[Tensor], Tensor]:
        threads = self._threads or torch.get_num_threads()
        session = self._session(name, threads)
        if self.device.type != "cpu" or threads == 1:
            return session
        return RowParallel(session, partial(self._session, name, 1), threads)

    def _session(self, name: str, threads: int) -> OnnxGraph:
        """Open a graph, checked to have the checkpoint's inputs and outputs and to need only files that the manifest names."""
        file = f"{name}.onnx"
        content = self._content(file)
        proto = graph.parse(content, file, weights=False)
        wrong = graph.interface_problems(proto, name, self.config)
        opset = {entry.domain: entry.version for entry in proto.opset_import}.get("")
        if opset != (recorded := self.export.manifest.options.get("opset", opset)):
            wrong.append(f"opset: made for {recorded}, found {opset}")
        if wrong:
            raise self.export.refused([f"{file}: {problem}" for problem in wrong], self._rebuild)
        beside = {external: self._content(external) for external in graph.external_files(proto, file)}
        return OnnxGraph(content, self.device, name=file, beside=beside, threads=threads)


def _device(device: str | torch.device | None) -> torch.device:
    return torch.device("cpu") if device is None and not has_cuda() else find_device(device)
