"""Export a checkpoint's encoders to ONNX: ``python export/to_onnx.py CHECKPOINT``, or ``finelip export onnx CHECKPOINT``.

The files are compared with the model before they are released (:mod:`finelip_fast.export.parity`).
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, whose seconds are part of the command
    from finelip_fast._command_line import run_script

    raise SystemExit(run_script("export", "onnx"))

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto
from tqdm import tqdm

from finelip_fast import checkpoint as checkpoints
from finelip_fast._arguments import one_of
from finelip_fast._versions import installed
from finelip_fast.errors import EngineError, InputError
from finelip_fast.export import graphs, parity, quantize
from finelip_fast.export.precision import HALF, in_half, rounding_twin
from finelip_fast.export.release import being_written, export_path, finish, hashes
from finelip_fast.model import FineLIP
from finelip_fast.runtimes.manifest import (
    PRECISIONS,
    Export,
    Manifest,
    exports_folder,
    read,
)
from finelip_fast.runtimes.onnx import CPU_ONLY, OnnxGraph, has_cuda

EXTRAS = ("image_uint8", "scorer")
CALIBRATION = "scenes:val:64"

_CALIBRATED = "int8-calibrated"


def export_onnx(
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    precision: str = "fp32",
    out: str | os.PathLike[str] | None = None,
    opset: int = graphs.OPSET,
    extras: Sequence[str] = (),
    data: str | None = None,
    calibration: str | None = None,
    keep_failed: bool = False,
    again: bool = False,
    progress: bool = True,
    reference: parity.Reference | None = None,
) -> Path:
    """Write and prove ``image.onnx`` and ``text.onnx`` of a checkpoint.

    Args:
        checkpoint: Folder, file or name, as :func:`finelip_fast.load` takes it.
        precision: ``"fp32"``; ``"fp16"`` or ``"bf16"`` (products in half precision); ``"int8"`` (linear layers, rows scaled at
            run time, for ONNX Runtime); ``"int8-calibrated"`` (linear layers, scales from calibration, for TensorRT).
        out: Folder to write; None means ``exports/onnx-PRECISION`` beside the checkpoint, where engines look.
        opset: ONNX operator set, at least 18.
        extras: Additional graphs: ``"image_uint8"``, ``"scorer"``; see :mod:`finelip_fast.export.graphs`.
        data: Held-out pairs for the comparison, as :func:`finelip_fast.datasets.open_dataset` takes them; None: those that an
            existing export was compared on, or ``scenes:test:200``.
        calibration: Pairs to calibrate ``"int8-calibrated"`` with, different from those; None: those of an existing export, or
            ``scenes:val:64``.
        keep_failed: Whether to keep refused files, as ``failed-…`` beside the folder.
        again: Whether to export even if a proven export of this checkpoint with these options exists.
        progress: Whether to show progress on stderr.
        reference: Embeddings of this checkpoint's model on ``data``, if there are any from another export.

    Returns:
        The folder, with ``manifest.json``, ``parity.json`` and ``parity.md`` beside the graphs.

    Raises:
        InputError: An unknown precision, extra or data set, an opset that is too old, or a folder with other contents.
        CheckpointError: A checkpoint that cannot be loaded.
        EngineError: The files do not reproduce the model.
        WriteError: The folder cannot be written; a previous export is kept.
    """
    one_of("precision", precision, PRECISIONS)
    if unknown := set(extras) - set(EXTRAS):
        raise InputError(f"expected extras of {EXTRAS}, got {sorted(unknown)}")
    if opset < graphs.LEAST_OPSET:
        raise InputError(f"expected opset of at least {graphs.LEAST_OPSET}, got {opset}")
    if calibration is not None and precision != _CALIBRATED:
        raise InputError(
            f"expected calibration with precision {_CALIBRATED!r} alone, got it with {precision!r}; leave it out"
        )
    folder = export_path(
        exports_folder(checkpoint) / f"onnx-{precision}" if out is None else out, keep_failed=keep_failed
    )
    model = checkpoints.load(checkpoint) if reference is None else reference.model
    fingerprint = checkpoints.fingerprint(model)
    names = ["image", "text", *extras]
    options: dict[str, Any] = {"opset": opset} | ({} if calibration is None else {"calibration": calibration})
    if not again and _up_to_date(folder, fingerprint, options, names, data):
        return folder
    if precision == _CALIBRATED:
        options["calibration"] = calibration = calibration or CALIBRATION
    reference = reference or parity.Reference(model, data or parity.DATA, progress=progress)
    with being_written(folder, keep_failed) as partial:  # first of all, so that an unwritable folder fails at once
        for name in tqdm(names, desc=f"export, {precision}", unit="graph", disable=not progress, leave=False):
            proto = graphs.build(model, name, opset=opset, metadata={"finelip.checkpoint": fingerprint})
            graphs.write(_in_precision(proto, name, precision, model, calibration), partial / f"{name}.onnx")
        report, devices = _prove(reference, partial, names, precision)
        finish(
            partial,
            report,
            Manifest(
                runtime="onnx",
                precision=precision,
                checkpoint=fingerprint,
                config=model.config.to_dict(),
                files=hashes(partial),
                versions=installed("finelip-fast", "torch", "onnx", "onnxruntime"),
                options=options,
                proof={**report.summary(), "devices": devices},
            ),
        )
    return folder


# ---- Graphs


def _up_to_date(
    folder: Path, fingerprint: str, options: dict[str, Any], names: Sequence[str], data: str | None
) -> bool:
    try:
        export: Export = read(folder)
        export.check(fingerprint, "", **options)
    except EngineError:
        return False
    is_compared = data is None or export.manifest.proof.get("pairs") == data
    return is_compared and all(f"{name}.onnx" in export.manifest.files for name in names)


def _in_precision(proto: ModelProto, name: str, precision: str, model: FineLIP, calibration: str | None) -> ModelProto:
    if name == "scorer" or precision == "fp32":
        return proto  # scores are always float32
    if precision == "int8":
        return quantize.by_rows(proto)
    if calibration is not None:
        return quantize.calibrated(in_half(proto, "fp16"), _calibration_batches(model, name, calibration))
    return in_half(proto, precision)


def _calibration_batches(model: FineLIP, name: str, spec: str) -> Iterator[dict[str, Any]]:
    reference = parity.Reference(model, spec, progress=False)
    batch = reference.captions if name == "text" else reference.pixels
    if name == "image_uint8":
        batch = parity.levels(batch, model.config)
    for part in batch.split(8):
        yield {"ids" if name == "text" else "pixels": part.numpy()}


def _prove(
    reference: parity.Reference, folder: Path, names: Sequence[str], precision: str
) -> tuple[parity.Report, list[str]]:
    """Prove the written files; return the report and the kinds of device that it covers: the CPU, and CUDA if available."""
    report = parity.prove(reference, _encoders(folder, names, precision, torch.device("cpu")), precision)
    if not report.passed or not (has_cuda() and torch.cuda.is_available()) or precision in CPU_ONLY:
        return report, ["cpu"]
    gpu = torch.device("cuda", torch.cuda.current_device())
    on = torch.cuda.get_device_name(gpu)
    also = parity.prove(reference, _encoders(folder, names, precision, gpu), precision, on=on)
    return report.also(also), ["cpu", "cuda"]


def _encoders(folder: Path, names: Sequence[str], precision: str, device: torch.device) -> parity.Encoders:
    """Open the written files in ONNX Runtime; on the CPU, half precision is rounded as on a GPU."""
    protos = {name: onnx.load(folder / f"{name}.onnx") for name in names}

    def load(name: str) -> OnnxGraph:
        if precision not in HALF or device.type == "cuda":
            return OnnxGraph(folder / f"{name}.onnx", device)
        # Unchanged, bfloat16 cannot run here, and float16 runs without its rounding.
        with tempfile.TemporaryDirectory() as scratch:
            graphs.write(rounding_twin(protos[name]), Path(scratch) / f"{name}.onnx")
            return OnnxGraph(Path(scratch) / f"{name}.onnx", device)

    run = {name: load(name) for name in names}
    return parity.Encoders(run.pop("image"), run.pop("text"), extras=run, graphs=protos)


# ---- Command line


def run(
    checkpoint: str | os.PathLike[str] | None,
    *,
    precision: Sequence[str],
    out: str | None,
    uint8: bool,
    scorer: bool,
    data: str | None,
    calibration: str | None,
    progress: bool,
    **options: Any,
) -> dict[str, Any]:
    """Export one or several precisions, each with the options of :func:`export_onnx`.

    Returns:
        Folders and proofs, by precision.

    Raises:
        InputError: Several precisions with a single folder, or a calibration for none of them.
    """
    for name in precision:
        one_of("precision", name, PRECISIONS)
    if out and len(precision) > 1:
        raise InputError("expected one --precision with --out, got several: each is a folder of its own")
    if calibration is not None and _CALIBRATED not in precision:
        raise InputError(
            f"expected --calibration with --precision {_CALIBRATED}, got {' '.join(precision)}; leave it out"
        )
    model = checkpoints.load(checkpoint) if len(precision) > 1 else None
    reference = parity.Reference(model, data or parity.DATA, progress=progress) if model is not None else None
    extras = [name for name, requested in zip(EXTRAS, (uint8, scorer), strict=True) if requested]
    exports: dict[str, Any] = {}
    for name in precision:
        folder = export_onnx(
            checkpoint,
            precision=name,
            out=out,
            extras=extras,
            data=data,
            calibration=calibration if name == _CALIBRATED else None,
            progress=progress,
            reference=reference,
            **options,
        )
        exports[name] = {"folder": str(folder), **read(folder).manifest.proof}
    return exports
