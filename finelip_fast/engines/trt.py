"""The TensorRT engine: plans that were built for this GPU and proven on it."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch

from finelip_fast._arguments import find_device
from finelip_fast.engines.exported import ExportedEngine
from finelip_fast.errors import EngineError
from finelip_fast.runtimes import trt
from finelip_fast.runtimes.manifest import Export, Manifest, find, rebuild_command
from finelip_fast.runtimes.trt import TrtPlan, expected_options


class TrtEngine(ExportedEngine):
    """Plans that ``finelip export trt`` built and proved.

    Args:
        checkpoint: Folder, file or name, as :func:`finelip_fast.load` takes it.
        export: Plans to run; see :func:`finelip_fast.runtimes.manifest.find`.
        device: A CUDA device; None means the current one.
        reason: Reason why this engine was chosen.

    Raises:
        EngineError: No TensorRT or no GPU, or plans that do not fit the checkpoint, this GPU or this version of TensorRT, or
            were not proven; the message says what differs, and which command helps.
        CheckpointError: A checkpoint that cannot be loaded.
    """

    name = "trt"
    _positions_at_once = 32

    def __init__(
        self,
        checkpoint: str | PathLike[str] | None,
        export: Export,
        device: str | torch.device | None = None,
        *,
        reason: str = "asked for",
    ) -> None:
        manifest = export.manifest
        if (why := trt.why_not()) is not None:
            raise EngineError(f"engine='trt' cannot run: {why}; use engine='torch'")
        gpu = find_device(device)
        if gpu.type != "cuda":
            raise EngineError(f"expected a CUDA device for engine='trt', got {str(gpu)!r}")
        machine = trt.machine(gpu, manifest.options.get("module"))
        expected = expected_options(manifest.options, machine)
        if not manifest.proven and all(manifest.options.get(name) == value for name, value in expected.items()):
            command = rebuild_command(checkpoint, "trt", manifest.precision, ["--prove", "--out", str(export.folder)])
            raise EngineError(
                f"{export.folder} cannot be used: it was never compared with the model. Compare it here: {command}"
            )
        super().__init__(checkpoint, export, gpu, reason=reason, **expected, **_graphs_beside(checkpoint, manifest))
        host_code = bool(manifest.options.get("version_compatible"))
        image, text = (
            TrtPlan(self._content(name), name, gpu, module=machine.module, host_code=host_code)
            for name in ("image.plan", "text.plan")
        )
        self._image, self._text = image, text
        self._largest_batch = min(image.largest_batch, text.largest_batch)
        self.description = f"{machine.gpu}, {manifest.precision}, {manifest.options['profile']['name']}"


def _graphs_beside(checkpoint: str | PathLike[str] | None, manifest: Manifest) -> dict[str, Any]:
    """The option ``onnx`` that plans must have if the graphs of their precision exist, too: they must be made from those."""
    precision = trt.ONNX_PRECISION.get(manifest.precision, manifest.precision)
    beside = find(checkpoint, "onnx", precision).exports
    return {"onnx": {name: beside[0].manifest.files.get(name) for name in manifest.options["onnx"]}} if beside else {}
