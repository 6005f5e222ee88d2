"""Choice of the engine: the one requested, or the fastest of those that are available and proven."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from statistics import median

import torch

from finelip_fast import checkpoint as checkpoints
from finelip_fast._arguments import find_device, one_of, whole_number
from finelip_fast._files import cache_folder, write_whole
from finelip_fast._json import read_json
from finelip_fast._versions import installed
from finelip_fast.config import FineLIPConfig
from finelip_fast.engines.base import ENGINES, Engine, EngineName
from finelip_fast.errors import EngineError, InputError
from finelip_fast.kernels import cpu
from finelip_fast.runtimes import manifest, onnx, trt
from finelip_fast.runtimes.manifest import Export, Precision

_ROUNDS = 3

# Width from which int8 takes about half the time of float32: every row is rounded, which costs relatively less in wide rows.
_WIDE = 512


def why_not(name: str) -> str | None:
    """Reason why an engine cannot run on this machine, whatever the checkpoint; None if it can."""
    return {"onnx": onnx.why_not, "trt": trt.why_not}.get(name, lambda: None)()


def open_engine(
    name: EngineName,
    checkpoint: str | PathLike[str] | None,
    device: str | torch.device | None = None,
    *,
    precision: Precision | None = None,
    threads: int | None = None,
    build: bool = False,
) -> Engine:
    """Open an engine on a checkpoint.

    Args:
        name: Name of an engine. ``"auto"`` takes the fastest that can run here in ``precision``, as measured the first time on
            this machine; any other name gives that engine or an error.
        checkpoint: Folder, file or name, as :func:`finelip_fast.load` takes it.
        device: Device to run on; None means a GPU if there is one.
        precision: Precision of an exported file, or of ``"torch"`` on a CPU (``"fp32"``, ``"bf16"``, ``"int8"``). None means
            the fastest available for exported files, and float32 (float16 on a GPU) for ``"torch"``.
        threads: Number of ONNX Runtime's threads on the CPU; None means as many as PyTorch uses.
        build: Whether to make the requested export if it is missing or does not fit; takes minutes.

    Raises:
        InputError: An unknown name, or settings that the engine does not have.
        EngineError: An engine or a device that cannot run here, or a precision that no engine has.
        CheckpointError: A checkpoint that cannot be loaded.
    """
    one_of("engine", name, ENGINES)
    threads = None if threads is None else whole_number("threads", threads)
    if precision is not None:
        one_of("precision", precision, manifest.PRECISIONS)
    if name == "torch":
        if threads is not None:
            raise InputError("threads is only for ONNX Runtime; with engine='torch' use torch.set_num_threads")
        return _torch(checkpoint, device, precision, "asked for")
    if build:
        _build(name, checkpoint, device, precision)
    runtimes = [runtime for runtime in manifest.RUNTIMES if name in ("auto", runtime)]
    candidates: list[Candidate] = []
    absent: dict[str, str] = {}
    for runtime in runtimes:
        if (reason := why_not(runtime)) is not None:
            absent[runtime] = reason
            continue
        exports = manifest.find(checkpoint, runtime, precision)
        candidates += [_exported(checkpoint, device, export, threads) for export in exports.exports]
        absent |= exports.damaged
        if not exports.exports and not exports.damaged:
            absent[runtime] = _missing_export(checkpoint, runtime, precision)
    if name != "auto":
        if not candidates:
            reason = "; ".join(absent.values())
            raise EngineError(
                f"engine={name!r} cannot run: {reason}; alternatively, use engine='torch' or engine='auto'"
            )
        if len(candidates) == 1 and not absent:
            return candidates[0].open("asked for")
        return fastest(candidates, absent)
    has_int8 = any("int8" in candidate.label for candidate in candidates)
    if (reason := _why_not_torch(device, precision)) is not None:
        absent["torch"] = reason
    else:
        candidates.append(_in_torch(checkpoint, device, precision, candidates[0].identity if candidates else ""))
    if not candidates:
        reasons = "; ".join(f"{runtime}: {why}" for runtime, why in absent.items())
        raise EngineError(f"no engine can run in {precision}: {reasons}; leave precision out")
    engine = fastest(candidates, absent)
    if precision is None and not has_int8 and engine.name == "torch" and engine.device.type == "cpu":
        engine.faster = _int8_advice(engine.config, checkpoint)
        engine.reason = "; ".join(filter(None, (engine.reason, engine.faster)))
    return engine


@dataclass(frozen=True)
class Candidate:
    """An engine that could be opened.

    Args:
        label: Name for use in a sentence.
        open: Function that opens it, given the reason why it was chosen.
        identity: Properties that its speed depends on, besides the machine.
    """

    label: str
    open: Callable[[str], Engine]
    identity: str


def fastest(candidates: list[Candidate], absent: dict[str, str] | None = None) -> Engine:
    """Open the candidate that encodes a picture and a caption in the least time.

    Each is timed once on a machine; the times are kept in this user's cache.

    Args:
        candidates: Engines to choose from, at least one.
        absent: Names of others, and why they are not candidates; included in the engine's reason.

    Raises:
        EngineError: None of them can be opened.
    """
    refused = dict(absent or {})
    seconds: dict[str, float] = {}
    times = _Times()
    for candidate in candidates if len(candidates) > 1 else ():
        known = times.known(candidate)
        if known is None:
            try:
                known = _seconds(candidate.open(""))
            except EngineError as error:
                refused[candidate.label] = str(error)
                continue
            times.add(candidate, known)
        seconds[candidate.label] = known
    for candidate in sorted(candidates, key=lambda entry: seconds.get(entry.label, math.inf)):
        if candidate.label in refused:
            continue
        try:
            engine = candidate.open("")
        except EngineError as error:
            refused[candidate.label] = str(error)
            continue
        engine.reason = _reason(candidate.label, seconds, refused)
        return engine
    raise EngineError("no engine can run: " + "; ".join(f"{label}: {why}" for label, why in refused.items()))


def _reason(chosen: str, seconds: dict[str, float], refused: dict[str, str]) -> str:
    parts = []
    timed = {label: time for label, time in seconds.items() if label != chosen and label not in refused}
    if timed:
        slower = ", ".join(f"{label} {1000 * time:.0f} ms" for label, time in sorted(timed.items(), key=lambda x: x[1]))
        parts.append(f"fastest here: {1000 * seconds[chosen]:.0f} ms a picture and a caption, {slower}")
    parts += [f"not {label}: {why}" for label, why in refused.items()]
    return "; ".join(parts) or "the only candidate"


def _seconds(engine: Engine) -> float:
    """Median time to encode one picture and one caption of half the context."""
    side, context = engine.config.image_size, engine.config.context_length
    pixels = torch.zeros(1, 3, side, side)
    ids = torch.full((1, max(2, context // 2)), engine.config.word_token)
    ids[0, -1] = engine.config.end_token

    def once() -> float:
        started = time.perf_counter()
        engine.encode_image(pixels).cpu()
        engine.encode_text(ids).cpu()
        return time.perf_counter() - started

    once()
    return median(once() for _ in range(_ROUNDS))


class _Times:
    """Times measured on this machine."""

    def __init__(self) -> None:
        self._path = cache_folder() / "engine_times.json"
        self._seconds: dict[str, float] = {}
        with contextlib.suppress(EngineError):  # lost times are measured again
            record = read_json(self._path, error=EngineError, kind=dict, max_bytes=1 << 22)
            self._seconds = {key: time for key, time in record.items() if type(time) is float and time > 0}

    def known(self, candidate: Candidate) -> float | None:
        return self._seconds.get(self._key(candidate))

    def add(self, candidate: Candidate, seconds: float) -> None:
        self._seconds[self._key(candidate)] = seconds
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, lambda path: path.write_text(json.dumps(self._seconds, indent=1), encoding="utf-8"))
        except OSError:
            pass  # a cache that cannot be written costs the measurement, not the search

    @staticmethod
    def _key(candidate: Candidate) -> str:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        machine = f"{platform.node()}, {gpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        return f"{machine}; {candidate.label}; {candidate.identity}"


def _torch(
    checkpoint: str | PathLike[str] | None, device: str | torch.device | None, precision: Precision | None, reason: str
) -> Engine:
    from finelip_fast.engines.torch import TorchEngine

    return TorchEngine(checkpoint, device, precision, reason=reason)


def _why_not_torch(device: str | torch.device | None, precision: Precision | None) -> str | None:
    """Reason why the model itself cannot run in a precision; None if it can."""
    from finelip_fast.engines.torch import precisions_on
    from finelip_fast.frozen import why_not

    place = find_device(device)
    known = precisions_on(place)
    if precision is None:
        return None
    if precision not in known:
        return f"it has {', '.join(known)} on {place.type}"
    return why_not(precision) if place.type == "cpu" else None


def _in_torch(
    checkpoint: str | PathLike[str] | None,
    device: str | torch.device | None,
    precision: Precision | None,
    identity: str,
) -> Candidate:
    """The model itself, in the requested precision or the device's first one."""
    from finelip_fast.engines.torch import NUMBERS, precisions_on

    label = f"torch {NUMBERS[precision or precisions_on(find_device(device))[0]]}"
    # "frozen": earlier versions measured the plain module.
    return Candidate(label, functools.partial(_torch, checkpoint, device, precision), f"{identity}, frozen")


def _int8_advice(config: FineLIPConfig, checkpoint: str | PathLike[str] | None) -> str:
    """How to encode in int8 if that takes about half the time, as measured for wide models on processors made for it."""
    if not cpu.has("vnni") or config.vision_width < _WIDE:
        return ""
    without = "--precision int8 (precision='int8')"
    if why_not("onnx") is not None:
        return f"int8 is about twice as fast on this processor: {without}"
    command = manifest.rebuild_command(checkpoint, "onnx", "int8")
    return (
        f"int8 is about twice as fast on this processor: {command} makes an export and proves it, {without} needs none"
    )


def _exported(
    checkpoint: str | PathLike[str] | None, device: str | torch.device | None, export: Export, threads: int | None
) -> Candidate:
    manifest_of_export = export.manifest

    def open_exported(reason: str) -> Engine:
        if manifest_of_export.runtime == "onnx":
            from finelip_fast.engines.onnx import OnnxEngine

            return OnnxEngine(checkpoint, export, device, threads=threads, reason=reason)
        from finelip_fast.engines.trt import TrtEngine

        return TrtEngine(checkpoint, export, device, reason=reason)

    runtimes = (
        installed("onnxruntime", "onnxruntime-gpu")
        if manifest_of_export.runtime == "onnx"
        else manifest_of_export.options.get("version")
    )
    identity = f"{runtimes}, {threads} threads, {sorted(manifest_of_export.files.values())}, on {device}"
    return Candidate(f"{manifest_of_export.runtime} {manifest_of_export.precision}", open_exported, identity)


def _missing_export(checkpoint: str | PathLike[str] | None, runtime: str, precision: str | None) -> str:
    command = manifest.rebuild_command(checkpoint, runtime, precision or default_precision(runtime))
    return f"no export in {manifest.exports_folder(checkpoint)} ({command} makes one, or build=True)"


def default_precision(runtime: str) -> str:
    """Precision that is built if none is named."""
    return "fp16" if runtime == "trt" or torch.cuda.is_available() else "fp32"


def _build(
    name: str, checkpoint: str | PathLike[str] | None, device: str | torch.device | None, precision: str | None
) -> None:
    """Export in a separate process: the exporter takes as much memory as the model again, and this one goes on to search."""
    if name == "auto":
        name = "trt" if find_device(device).type == "cuda" and why_not("trt") is None else "onnx"
    if (reason := why_not(name)) is not None:
        raise EngineError(f"engine={name!r} cannot be built: {reason}")
    precision = precision or default_precision(name)
    fingerprint = checkpoints.fingerprint(checkpoint)
    for export in manifest.find(checkpoint, name, precision).exports:
        with contextlib.suppress(EngineError):
            export.check(fingerprint, "")
            return
    arguments = manifest.rebuild_arguments(checkpoint, name, precision)
    command = [sys.executable, "-m", "finelip_fast.cli", *arguments]
    output = b""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stderr is not None
        while part := process.stderr.read(4096):  # progress, as it comes
            sys.stderr.write(part.decode(errors="replace"))
            sys.stderr.flush()
            output = (output + part)[-2000:]
    if process.returncode:
        raise EngineError(f"{shlex.join(['finelip', *arguments])} failed: {output.decode(errors='replace').strip()}")
