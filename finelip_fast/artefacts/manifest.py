"""Exports: encoders in another runtime's files, kept beside their checkpoint, each set in a folder of its own::

    CHECKPOINT/exports/
        onnx-fp32/          image.onnx  text.onnx  manifest.json  parity.json  parity.md
        trt-fp16-sm89/      image.plan  text.plan  manifest.json  …

The manifest says what the files were made from and for, and whether they proved to give the model's own embeddings. Nothing is
loaded that does not fit it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from finelip_fast._errors import EngineError, InputError
from finelip_fast._files import write_whole
from finelip_fast.kernels._settings import cache_folder

FORMAT = "finelip_fast_export/1"
MANIFEST = "manifest.json"

RUNTIMES = ("onnx", "trt")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8-calibrated")


@dataclass(frozen=True)
class Manifest:
    """What an export is.

    Attributes:
        runtime: ``"onnx"`` or ``"trt"``.
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"`` or ``"int8-calibrated"``.
        checkpoint: Fingerprint of the checkpoint, as :func:`finelip_fast.checkpoint.fingerprint` gives it.
        config: The model's sizes, as :meth:`finelip_fast.config.FineLIPConfig.to_dict` gives them.
        files: Name of each file -> SHA-256 of its content.
        versions: Packages that made it.
        options: What else it was made with: ``opset`` of ONNX; of TensorRT ``module``, ``version``, ``gpu``,
            ``compute_capability``, ``profile``, ``onnx`` (the files' hashes) and the builder's options.
        proof: How it compared with the model on this kind of device; empty until it was compared.
    """

    runtime: str
    precision: str
    checkpoint: str
    config: dict[str, Any]
    files: dict[str, str]
    versions: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    proof: dict[str, Any] = field(default_factory=dict)

    @property
    def proven(self) -> bool:
        """Whether the files gave the model's own embeddings, within their precision's limits."""
        return self.proof.get("passed") is True

    def write(self, folder: Path) -> None:
        """Write it into a folder, whole or not at all."""
        text = json.dumps({"format": FORMAT, **vars(self)}, indent=1) + "\n"
        write_whole(folder / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))


@dataclass(frozen=True)
class Export:
    """A folder with its manifest."""

    folder: Path
    manifest: Manifest

    def check(self, checkpoint: str, rebuild: str, **expected: Any) -> None:
        """Refuse files that are not what they should be, or were not proven.

        Args:
            checkpoint: Fingerprint of the checkpoint that is to be run.
            rebuild: The command that makes the export anew.
            expected: Options of the manifest that must have these values.

        Raises:
            EngineError: Says every difference and the command.
        """
        manifest = self.manifest
        wrong = []
        if manifest.checkpoint != checkpoint:
            wrong.append(f"checkpoint: made from {manifest.checkpoint[:12]}…, this one is {checkpoint[:12]}…")
        for name, value in expected.items():
            if manifest.options.get(name) != value:
                wrong.append(f"{name}: made for {manifest.options.get(name)!r}, here it is {value!r}")
        for name, digest in manifest.files.items():
            path = self.folder / name
            if not path.is_file():
                wrong.append(f"{name}: missing")
            elif file_hash(path) != digest:
                wrong.append(f"{name}: not the file that was proven (another SHA-256)")
        if not manifest.proven:
            wrong.append("proof: it was never compared with the model")
        if wrong:
            raise EngineError(f"{self.folder} cannot be used: {'; '.join(wrong)}. Make it anew: {rebuild}")


def read(folder: Path) -> Export:
    """The export in a folder.

    Raises:
        EngineError: There is none, or its manifest is not one of this version.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT!r}")
        unknown = set(values) - {one.name for one in fields(Manifest)}
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)}")
        return Export(folder, Manifest(**values))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{path}: no manifest of an export: {error}; make the export anew") from error


def find(checkpoint: str | os.PathLike[str] | None, runtime: str, precision: str | None = None) -> list[Export]:
    """The exports beside a checkpoint, by the names of their folders.

    Args:
        checkpoint: As :func:`finelip_fast.load` takes it.
        runtime: ``"onnx"`` or ``"trt"``.
        precision: Of this precision alone.

    Raises:
        EngineError: A folder whose manifest cannot be read.
    """
    folders = sorted(path.parent for path in exports_folder(checkpoint).glob(f"{runtime}-*/{MANIFEST}"))
    found = [read(folder) for folder in folders]
    return [export for export in found if precision in (None, export.manifest.precision)]


def check_precision(precision: str) -> None:
    """Raise InputError unless the precision is one of :data:`PRECISIONS`."""
    if precision not in PRECISIONS:
        raise InputError(f"expected precision to be one of {PRECISIONS}, got {precision!r}")


def exports_folder(checkpoint: str | os.PathLike[str] | None) -> Path:
    """Where a checkpoint's exports lie: ``exports`` in its folder, ``FILE.exports`` beside its file; for the bundled one and
    those of a hub, in this user's cache."""
    if checkpoint is not None and (path := Path(os.path.expanduser(checkpoint))).exists():
        return path / "exports" if path.is_dir() else path.with_name(f"{path.name}.exports")
    name = "bundled" if checkpoint is None else re.sub(r"[^\w.-]+", "--", os.fspath(checkpoint))
    return cache_folder() / "exports" / name


def rebuild_arguments(
    checkpoint: str | os.PathLike[str] | None, runtime: str, precision: str, options: Sequence[str] = ()
) -> list[str]:
    """What makes an export, as arguments of ``finelip``."""
    named = [] if checkpoint is None else [os.fspath(checkpoint)]
    return ["export", runtime, *named, "--precision", precision, *options]


def rebuild_command(
    checkpoint: str | os.PathLike[str] | None, runtime: str, precision: str, options: Sequence[str] = ()
) -> str:
    """What to type to make an export."""
    return shlex.join(["finelip", *rebuild_arguments(checkpoint, runtime, precision, options)])


def installed(*packages: str) -> dict[str, str]:
    """Versions of the packages that are here."""
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
