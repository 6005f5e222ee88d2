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
        checkpoint: As :func:`finelip_fast.load` takes it.
        export: Which plans; see :func:`finelip_fast.runtimes.manifest.find`.
        device: A CUDA device; None takes the current one.
        precision: What the plans must be; None: whatever they are.
        profile: The optimisation profile that they must have, by its name; None: whichever it is.
        reason: Why this engine was chosen.

    Raises:
        EngineError: No TensorRT or no GPU, or plans that do not fit the checkpoint, this GPU, this version of TensorRT, or
            what was asked for, or were not proven; says what differs, and the command that helps.
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
        precision: str | None = None,
        profile: str | None = None,
        reason: str = "asked for",
    ) -> None:
        made = export.manifest
        refuse_others(export, checkpoint, precision, profile)
        if (why := trt.why_not()) is not None:
            raise EngineError(f"engine='trt' cannot run: {why}; use engine='torch'")
        found = find_device(device)
        if found.type != "cuda":
            raise EngineError(f"expected a CUDA device for engine='trt', got {str(found)!r}")
        here = trt.machine(found, made.options.get("module"))
        expected = expected_options(made.options, here)
        if not made.proven and all(made.options.get(name) == value for name, value in expected.items()):
            command = rebuild_command(checkpoint, "trt", made.precision, ["--prove", "--out", str(export.folder)])
            raise EngineError(
                f"{export.folder} cannot be used: proof: it was never compared with the model. Prove it here: {command}"
            )
        super().__init__(checkpoint, export, found, reason=reason, **expected, **_graphs_beside(checkpoint, made))
        host_code = bool(made.options.get("version_compatible"))
        image, text = (
            TrtPlan(self._content(name), name, found, module=here.module, host_code=host_code)
            for name in ("image.plan", "text.plan")
        )
        self._image, self._text = image, text
        self._largest_batch = min(image.largest_batch, text.largest_batch)
        self.description = f"{here.gpu}, {made.precision}, {made.options['profile']['name']}"


def _graphs_beside(checkpoint: str | PathLike[str] | None, made: Manifest) -> dict[str, Any]:
    """The option ``onnx`` that plans must have where the graphs of their precision are there, too: made from just those."""
    precision = trt.ONNX_PRECISION.get(made.precision, made.precision)
    beside = find(checkpoint, "onnx", precision).exports
    return {"onnx": {name: beside[0].manifest.files.get(name) for name in made.options["onnx"]}} if beside else {}


def refuse_others(
    export: Export, checkpoint: str | PathLike[str] | None, precision: str | None, profile: str | None
) -> None:
    """Refuse plans that are not what was asked for.

    Raises:
        EngineError: Says what differs, and the command that makes what was asked for.
    """
    made = export.manifest
    there = made.options.get("profile", {}).get("name")
    asked = {"precision": (made.precision, precision), "profile": (there, profile)}
    wrong = [
        f"{name}: made for {was!r}, asked for {wanted!r}"
        for name, (was, wanted) in asked.items()
        if wanted is not None and was != wanted
    ]
    if wrong:
        options = ["--profile", profile or there] if profile or there else []
        command = rebuild_command(checkpoint, "trt", precision or made.precision, options)
        raise EngineError(f"{export.folder} cannot be used: {'; '.join(wrong)}. Make it anew: {command}")
