"""Build a checkpoint's encoders as TensorRT plans: ``python export/to_trt.py``, or ``finelip export trt``.

The plans are made from proven ONNX graphs and compared with the model before they are released. The comparison needs the GPU
that they are for: plans for another one, named by its compute capability, are proven there, with ``--prove``.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, whose seconds are part of the command
    from finelip_fast._command_line import run_script

    raise SystemExit(run_script("export", "trt"))

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch

from finelip_fast import checkpoint as checkpoints
from finelip_fast._arguments import one_of
from finelip_fast._versions import installed
from finelip_fast.config import FineLIPConfig
from finelip_fast.errors import EngineError, InputError
from finelip_fast.export import parity, to_onnx
from finelip_fast.export.plans import Builder, build_plan, capability, refit_plan
from finelip_fast.export.release import being_written, export_path, finish, hashes
from finelip_fast.runtimes import trt as runtime
from finelip_fast.runtimes.graph import parse
from finelip_fast.runtimes.manifest import Export, Manifest, exports_folder, read, rebuild_command

PRECISIONS = ("fp16", "bf16", "fp32", "int8")
_GRAPHS = ("image", "text")

_PROFILES = {"latency": ((1, 1, 1), (1, 4, 16)), "throughput": ((1, 32, 128),)}

Batches = tuple[int, int, int]


def export_trt(
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    precision: str = "fp16",
    profile: str = "latency",
    compute_capability: str | None = None,
    out: str | os.PathLike[str] | None = None,
    builder: Builder | None = None,
    refit: str | os.PathLike[str] | None = None,
    data: str | None = None,
    keep_failed: bool = False,
    again: bool = False,
    progress: bool = True,
) -> Path:
    """Build ``image.plan`` and ``text.plan`` of a checkpoint.

    Args:
        checkpoint: Folder, file or name, as :func:`finelip_fast.load` takes it.
        precision: ``"fp16"``, ``"bf16"``, ``"fp32"``, or ``"int8"`` (linear layers, scales from calibration; the rest fp16).
        profile: Batch sizes to build for: ``"latency"`` (1, and up to 16), ``"throughput"`` (up to 128, best at 32) or
            ``"1,OPT,MAX"``. Texts may have 1 to all positions, best at half of them.
        compute_capability: Compute capability of the GPU to build for, such as ``"8.9"``. Needs ``tensorrt_rtx``. Default:
            this machine's GPU, with ``tensorrt`` if both are installed.
        out: Folder to write; None means ``exports/trt-PRECISION-smCAPABILITY`` beside the checkpoint, where engines look
            (``exports/stripped-trt-…`` for plans without weights, which no engine can run).
        builder: Options of the builder.
        refit: Folder of refittable plans to fill with this checkpoint's weights instead of building; its profile is kept.
        data: Held-out pairs for the comparison, as :func:`finelip_fast.datasets.open_dataset` takes them; None: those that
            existing plans were compared on, or ``scenes:test:200``. Existing plans are compared again on other pairs.
        keep_failed: Whether to keep refused files, as ``failed-…`` beside the folder.
        again: Whether to build even if the same plans exist.
        progress: Whether to show progress on stderr.

    Returns:
        The folder, with ``manifest.json`` beside the plans, and the report of the comparison if there was one.

    Raises:
        InputError: An unknown precision or profile, a data set that does not exist, or a folder with other contents.
        CheckpointError: A checkpoint that cannot be loaded.
        EngineError: No TensorRT that can build this here, a failed build, weights that do not fit the plans of ``refit``, or
            plans that do not reproduce the model.
        WriteError: The folder cannot be written; previous plans are kept.
    """
    one_of("precision", precision, PRECISIONS)
    batches = profile_batches(profile)
    builder = builder or Builder()
    target = find_target(compute_capability)
    folder = export_path(
        _folder(checkpoint, precision, target.compute_capability, builder.strip) if out is None else out,
        keep_failed=keep_failed,
    )
    _check_gpu_options(builder, refit is not None)
    old = None if refit is None else _read_refittable(Path(refit), precision)
    graphs = to_onnx.export_onnx(
        checkpoint, precision=runtime.ONNX_PRECISION.get(precision, precision), data=data, progress=progress
    )
    source = read(graphs).manifest
    options = _options(target, graphs, source, profile, batches, builder)
    if old is not None:
        options = _refitted_options(old, source, options)
    manifest = Manifest(
        runtime="trt",
        precision=precision,
        checkpoint=source.checkpoint,
        config=source.config,
        files={},
        versions=installed("finelip-fast", "torch") | {target.module: target.version},
        options=options,
    )
    if not again and _up_to_date(folder, manifest):
        existing = read(folder).manifest
        is_compared = existing.proven and data in (None, existing.proof.get("pairs"))
        if not is_compared and _runs_here(existing):
            prove_trt(checkpoint, folder, data=data, keep_failed=keep_failed, progress=progress)
        return folder
    with being_written(folder, keep_failed) as partial:
        for name in _GRAPHS:
            path = graphs / f"{name}.onnx"
            if old is not None:
                plan = refit_plan(old.folder / f"{name}.plan", path, target.module)
            else:
                shapes = input_shapes(name, FineLIPConfig.from_dict(source.config), batches)
                plan = build_plan(path, shapes, target, builder, progress=progress)
            (partial / f"{name}.plan").write_bytes(plan)
        manifest = dataclasses.replace(manifest, files=hashes(partial))
        if _runs_here(manifest):
            report = _compare(partial, manifest, checkpoint, data, progress)
            finish(partial, report, dataclasses.replace(manifest, proof=report.summary()))
        else:
            manifest.write(partial)
    return folder


def prove_trt(
    checkpoint: str | os.PathLike[str] | None,
    folder: Path,
    *,
    data: str | None = None,
    keep_failed: bool = False,
    progress: bool = True,
) -> Path:
    """Compare plans that were built elsewhere with the model, on the GPU that they are for.

    Args:
        checkpoint: Folder, file or name, as :func:`finelip_fast.load` takes it.
        folder: Folder of the plans.
        data, keep_failed, progress: As in :func:`export_trt`.

    Returns:
        The folder, whose manifest now has the proof.

    Raises:
        InputError: A folder with other contents beside the plans.
        EngineError: No TensorRT or no GPU here, plans that are not for it or not of this checkpoint, or plans that do not
            reproduce the model, which are deleted.
        WriteError: The folder cannot be written; the plans are kept.
    """
    folder = export_path(folder, keep_failed=keep_failed)
    export = read(folder)
    machine = runtime.machine(module=export.manifest.options.get("module"))
    _check_but_proof(
        export,
        checkpoints.fingerprint(checkpoints.load(checkpoint)),
        rebuild_command(checkpoint, "trt", export.manifest.precision),
        **runtime.expected_options(export.manifest.options, machine),
        stripped=False,
    )
    report = _compare(folder, export.manifest, checkpoint, data, progress)
    try:
        with being_written(folder, keep_failed) as partial:
            for name in export.manifest.files:
                shutil.copy2(folder / name, partial / name)
            finish(partial, report, dataclasses.replace(export.manifest, proof=report.summary()))
    except EngineError:
        shutil.rmtree(folder)  # refused plans must not be found again
        raise
    return folder


# ---- Decisions


def profile_batches(profile: str) -> tuple[Batches, ...]:
    """Minimum, optimum and maximum batch of each optimisation profile.

    Raises:
        InputError: Neither a known name nor three numbers that rise from 1.
    """
    if profile in _PROFILES:
        return _PROFILES[profile]
    numbers = [int(part) for part in profile.split(",") if part.strip().isdecimal()]
    if len(numbers) != 3 or profile.count(",") != 2 or not 1 == numbers[0] <= numbers[1] <= numbers[2]:
        raise InputError(
            f"expected profile to be one of {tuple(_PROFILES)} or batch sizes '1,OPT,MAX' that rise from 1 "
            f"(a query is a batch of 1), got {profile!r}"
        )
    return ((numbers[0], numbers[1], numbers[2]),)


def text_lengths(config: FineLIPConfig) -> tuple[int, int, int]:
    """Minimum, optimum and maximum number of positions."""
    return 1, max(1, config.context_length // 2), config.context_length


def input_shapes(graph: str, config: FineLIPConfig, batches: Sequence[Batches]) -> list[list[tuple[int, ...]]]:
    """Minimum, optimum and maximum shape of a graph's input, for each optimisation profile."""
    if graph == "image":
        return [[(batch, 3, config.image_size, config.image_size) for batch in sizes] for sizes in batches]
    return [list(zip(sizes, text_lengths(config), strict=True)) for sizes in batches]


def find_target(compute_capability: str | None) -> runtime.Machine:
    """Find the TensorRT module to build with, and the GPU to build for.

    Raises:
        InputError: Not a compute capability.
        EngineError: No TensorRT here that can build for it.
    """
    if compute_capability is None:
        if not runtime.importable():
            raise EngineError(f"TensorRT is not installed: {runtime.INSTALL}")
        if not torch.cuda.is_available():
            raise EngineError(
                "TensorRT builds for the local GPU, but PyTorch finds none; name a GPU with --compute-capability, "
                "such as 8.9 (tensorrt_rtx can build without a GPU, tensorrt cannot)"
            )
        return runtime.machine()
    if not re.fullmatch(r"\d+\.\d", compute_capability):
        raise InputError(f"expected a compute capability such as '8.9', got {compute_capability!r}")
    if "tensorrt_rtx" not in runtime.importable():
        raise EngineError(
            f"expected tensorrt_rtx, the only module that builds for a named GPU, got {list(runtime.importable())}: "
            "pip install 'finelip-fast[trt-rtx]', or leave --compute-capability out where the GPU is"
        )
    trt = runtime.load_module("tensorrt_rtx")
    if capability(trt, compute_capability) is None:
        known = sorted(name[2:-1] + "." + name[-1] for name in dir(trt.ComputeCapability) if name.startswith("SM"))
        raise EngineError(
            f"expected a compute capability that tensorrt_rtx builds for, {known}, got {compute_capability}"
        )
    return runtime.Machine("tensorrt_rtx", trt.__version__, None, compute_capability)


def structure(path: Path) -> str:
    """SHA-256 of an ONNX graph without its weights: nodes; names, sizes and types of constants; values of int64 constants.

    It can differ between two checkpoints: the exporter merges constants that are equal and drops those that do nothing.
    """
    graph = parse(path.read_bytes(), path.name).graph
    digest = hashlib.sha256()
    for node in graph.node:
        digest.update(node.SerializeToString(deterministic=True))
    for tensor in sorted(graph.initializer, key=lambda entry: entry.name):
        digest.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}".encode())
        if tensor.data_type == onnx.TensorProto.INT64:
            digest.update(tensor.raw_data + repr(list(tensor.int64_data)).encode())
    return digest.hexdigest()


def _check_gpu_options(builder: Builder, refit: bool) -> None:
    required = {
        "--refittable": builder.refittable,
        "--strip": builder.strip,
        "--version-compatible": builder.version_compatible,
        "--refit": refit,
    }
    if names := [name for name, is_wanted in required.items() if is_wanted and not torch.cuda.is_available()]:
        raise EngineError(f"{', '.join(names)}: TensorRT needs the GPU for this, and PyTorch finds none here")


def _folder(checkpoint: str | os.PathLike[str] | None, precision: str, capability: str, stripped: bool) -> Path:
    name = f"trt-{precision}-sm{capability.replace('.', '')}"
    return exports_folder(checkpoint) / (f"stripped-{name}" if stripped else name)


def _options(
    target: runtime.Machine, graphs: Path, source: Manifest, profile: str, batches: Sequence[Batches], builder: Builder
) -> dict[str, Any]:
    options = {
        **target._asdict(),
        "profile": {
            "name": profile,
            "batches": batches,
            "lengths": text_lengths(FineLIPConfig.from_dict(source.config)),
        },
        "onnx": {f"{name}.onnx": source.files[f"{name}.onnx"] for name in _GRAPHS},
        "structure": {f"{name}.onnx": structure(graphs / f"{name}.onnx") for name in _GRAPHS},
        "workspace": builder.workspace,
        "version_compatible": builder.version_compatible,
        "hardware_compatible": builder.hardware_compatible,
        "refittable": builder.refittable or builder.strip,
        "stripped": builder.strip,
    }
    as_read: dict[str, Any] = json.loads(json.dumps(options))  # lists, as read back from the manifest
    return as_read


def _up_to_date(folder: Path, manifest: Manifest) -> bool:
    try:
        export = read(folder)
        _check_but_proof(export, manifest.checkpoint, "", **manifest.options)
    except EngineError:
        return False
    return export.manifest.precision == manifest.precision


def _check_but_proof(export: Export, fingerprint: str, rebuild: str, **expected: Any) -> None:
    proven = dataclasses.replace(export.manifest, proof={"passed": True})
    Export(export.folder, proven).check(fingerprint, rebuild, **expected)


def _runs_here(manifest: Manifest) -> bool:
    """Whether the GPU that plans are for is here, to compare them with the model."""
    if manifest.options["stripped"] or runtime.why_not() is not None:
        return False
    expected = runtime.expected_options(manifest.options, runtime.machine(module=manifest.options["module"]))
    return all(manifest.options[name] == value for name, value in expected.items())


def _compare(
    folder: Path, manifest: Manifest, checkpoint: str | os.PathLike[str] | None, data: str | None, progress: bool
) -> parity.Report:
    device = torch.device("cuda", torch.cuda.current_device())
    image, text = (
        runtime.TrtPlan(
            (folder / f"{name}.plan").read_bytes(),
            f"{name}.plan",
            device,
            module=manifest.options["module"],
            host_code=manifest.options["version_compatible"],
        )
        for name in _GRAPHS
    )
    reference = parity.Reference(checkpoints.load(checkpoint), data or parity.DATA, progress=progress)
    precision = runtime.ONNX_PRECISION.get(manifest.precision, manifest.precision)
    return parity.prove(reference, parity.Encoders(image, text), precision, on=torch.cuda.get_device_name(device))


# ---- Refitting


def _read_refittable(folder: Path, precision: str) -> Export:
    """Read the plans to refit, and check everything except the new weights."""
    export = read(folder)
    manifest = export.manifest
    if manifest.runtime != "trt" or not manifest.options.get("refittable"):
        raise EngineError(
            f"{folder}: expected plans that were built with --refittable; build some, or leave --refit out"
        )
    if manifest.precision != precision:
        raise EngineError(f"{folder}: expected plans of precision {precision!r}, got {manifest.precision!r}")
    machine = runtime.machine(module=manifest.options["module"])
    _check_but_proof(
        export, manifest.checkpoint, "without --refit", **runtime.expected_options(manifest.options, machine)
    )
    return export


def _refitted_options(old: Export, source: Manifest, options: dict[str, Any]) -> dict[str, Any]:
    """Options of plans that are refitted with other graphs.

    Raises:
        EngineError: The graphs differ in more than their weights.
    """
    manifest = old.manifest
    wrong = [name for name, value in source.config.items() if manifest.config.get(name) != value]
    if wrong:
        raise EngineError(f"{old.folder}: its model has other sizes ({', '.join(wrong)}); build without --refit")
    different = [
        name for name, digest in options["structure"].items() if manifest.options["structure"].get(name) != digest
    ]
    if different:
        raise EngineError(
            f"{old.folder}: {', '.join(different)} of the two checkpoints differ in more than their weights: the exporter "
            "merges constants that are equal and drops those that are zero; build without --refit"
        )
    return {**manifest.options, "onnx": options["onnx"], "stripped": False}


# ---- Command line


def run(
    checkpoint: str | os.PathLike[str] | None,
    *,
    precision: str,
    profile: str,
    compute_capability: str | None,
    out: str | None,
    refit: str | None,
    prove: bool,
    data: str | None,
    keep_failed: bool,
    again: bool,
    progress: bool,
    **builder: Any,
) -> dict[str, Any]:
    """Build plans, or prove plans from elsewhere; ``builder`` holds the fields of :class:`Builder`.

    Returns:
        Folder, options and proof of the plans.
    """
    one_of("precision", precision, PRECISIONS)
    if prove:
        machine = runtime.machine()
        folder = _folder(checkpoint, precision, machine.compute_capability, False) if out is None else Path(out)
        folder = prove_trt(checkpoint, folder, data=data, keep_failed=keep_failed, progress=progress)
    else:
        folder = export_trt(
            checkpoint,
            precision=precision,
            profile=profile,
            compute_capability=compute_capability,
            out=out,
            builder=Builder(**builder),
            refit=refit,
            data=data,
            keep_failed=keep_failed,
            again=again,
            progress=progress,
        )
    manifest = read(folder).manifest
    options = {name: manifest.options[name] for name in ("module", "version", "compute_capability")}
    result = {
        "folder": str(folder),
        "precision": manifest.precision,
        **options,
        "profile": manifest.options["profile"]["name"],
    }
    if not manifest.proven and not manifest.options["stripped"]:
        arguments = ["--prove", *(["--out", out] if out else [])]
        result["prove"] = rebuild_command(checkpoint, "trt", manifest.precision, arguments)
    return {**result, **manifest.proof}
