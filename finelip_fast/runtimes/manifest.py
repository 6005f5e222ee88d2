"""Exports: encoders in files for another runtime, kept beside their checkpoint, each set in its own folder::

    CHECKPOINT/exports/
        onnx-fp32/          image.onnx  text.onnx  manifest.json  parity.json  parity.md
        trt-fp16-sm89/      image.plan  text.plan  manifest.json  …

The manifest says what the files were made from and for, and whether they were proven to give the model's own embeddings. Files
that do not match it are never loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from finelip_fast._files import cache_folder, file_hash, plain_name, read_bytes, write_text_whole
from finelip_fast._json import read_json
from finelip_fast.errors import EngineError

FORMAT = "finelip_fast_export/1"
MANIFEST = "manifest.json"

RUNTIMES = ("onnx", "trt")
FILES = {"onnx": ("image.onnx", "text.onnx"), "trt": ("image.plan", "text.plan")}  # what an engine runs
Precision = Literal["fp32", "fp16", "bf16", "int8", "int8-calibrated"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class Manifest:
    """Description of an export.

    Attributes:
        runtime: ``"onnx"`` or ``"trt"``.
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"`` or ``"int8-calibrated"``.
        checkpoint: Fingerprint of the checkpoint, as returned by :func:`finelip_fast.checkpoint.fingerprint`.
        config: The model's sizes, as returned by :meth:`finelip_fast.config.FineLIPConfig.to_dict`.
        files: SHA-256 of each file's content, by name.
        versions: Versions of the packages that made it.
        options: Other settings that it was made with: for ONNX ``opset`` and ``calibration``; for TensorRT ``module``,
            ``version``, ``gpu``, ``compute_capability``, ``profile``, ``onnx`` (the files' hashes) and the builder's options.
        proof: Result of its comparison with the model on this kind of device; empty until it was compared.
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
        """Write the manifest into a folder, completely or not at all."""
        text = json.dumps({"format": FORMAT, **vars(self)}, indent=1) + "\n"
        write_text_whole(folder / MANIFEST, text)


@dataclass(frozen=True)
class Export:
    """A folder with its manifest."""

    folder: Path
    manifest: Manifest

    def check(self, checkpoint: str, rebuild: str, **expected: Any) -> None:
        """Refuse files that are not as expected, or were not proven.

        Args:
            checkpoint: Fingerprint of the checkpoint to run.
            rebuild: Command that rebuilds the export.
            expected: Options of the manifest that must have these values.

        Raises:
            EngineError: The files are refused; the message gives every difference and the command.
        """
        wrong = self.differences(checkpoint, **expected)
        for name, digest in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file():
                wrong.append(f"{name}: missing")
            elif file_hash(path) != digest:
                wrong.append(_CHANGED.format(name))
        if wrong:
            raise self.refused(wrong, rebuild)

    def differences(self, checkpoint: str, **expected: Any) -> list[str]:
        """List the reasons in the manifest alone not to run the files; the arguments are those of :meth:`check`."""
        manifest = self.manifest
        wrong = []
        if manifest.checkpoint != checkpoint:
            wrong.append(f"checkpoint: made from {manifest.checkpoint[:12]}…, this one is {checkpoint[:12]}…")
        for name, value in expected.items():
            if manifest.options.get(name) != value:
                wrong.append(f"{name}: made for {manifest.options.get(name)!r:.80}, here it is {value!r:.80}")
        wrong += [_UNNAMED.format(name) for name in FILES[manifest.runtime] if name not in manifest.files]
        if not manifest.proven:
            wrong.append("proof: it was never compared with the model")
        return wrong

    def content(self, name: str, rebuild: str, *, max_bytes: int) -> bytes:
        """Read a file's bytes, verified by the manifest's hash: they can be run, whatever happens to the file.

        Args:
            name: Name of the file.
            rebuild: Command that rebuilds the export.
            max_bytes: Size above which the file is refused without being read.

        Raises:
            EngineError: The manifest does not name the file, or it is missing, too large, or another one.
        """
        if name not in self.manifest.files:
            raise self.refused([_UNNAMED.format(name)], rebuild)
        if not (self.folder / name).exists():
            raise self.refused([f"{name}: missing"], rebuild)
        content = read_bytes(self.folder / name, error=EngineError, max_bytes=max_bytes)
        if hashlib.sha256(content).hexdigest() != self.manifest.files[name]:
            raise self.refused([_CHANGED.format(name)], rebuild)
        return content

    def refused(self, wrong: Sequence[str], rebuild: str) -> EngineError:
        """Create the error for an export with these problems."""
        return EngineError(f"{self.folder} cannot be used: {'; '.join(wrong)}. Export it again: {rebuild}")


_UNNAMED = "{}: the manifest does not name it"
_CHANGED = "{}: not the file that was proven (another SHA-256)"


def read(folder: Path) -> Export:
    """Read the export in a folder.

    Raises:
        EngineError: There is none, or its manifest is not one of this version.
    """
    path = folder / MANIFEST
    try:
        values = read_json(path, error=EngineError, expected="a manifest", kind=dict, max_bytes=_MAX_BYTES)
        return Export(folder, _parse(values, path))
    except EngineError as error:
        raise EngineError(f"{error}; export it again") from None


def _parse(values: dict[str, Any], path: Path) -> Manifest:
    if (version := values.pop("format", None)) != FORMAT:
        raise EngineError(f"{path}: expected format {FORMAT!r}, got {version!r:.40}")
    names = {entry.name for entry in fields(Manifest)}
    if unknown := set(values) - names:
        raise EngineError(f"{path}: unknown fields {sorted(unknown)!r:.80}")
    if missing := names - set(values) - {"options", "proof"}:
        raise EngineError(f"{path}: missing fields {sorted(missing)}")
    _require(values, _FIELDS, path)
    for name in values["files"]:
        plain_name(name, f"{path}: files", error=EngineError)
    options = values.get("options", {})
    if values["runtime"] == "trt" and (missing := _TRT_OPTIONS - set(options)):
        raise EngineError(f"{path}: missing options {sorted(missing)}")
    _require(options, _OPTIONS, path)
    _require(values.get("proof", {}), _PROOF, path)
    return Manifest(**values)


# ---- Requirements for each value of a manifest


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_capability(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\d{1,3}\.\d", value) is not None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _are_counts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_is_count, value))


def _are_hashes(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_hash, value.values()))


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_profile(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and isinstance(value.get("batches"), (list, tuple))
        and all(map(_are_counts, value["batches"]))
        and _are_counts(value.get("lengths"))
    )


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


_Rules = dict[str, tuple[Callable[[Any], bool], str]]
_MAX_BYTES = 1 << 20
_FIELDS: _Rules = {
    "runtime": (RUNTIMES.__contains__, f"one of {RUNTIMES}"),
    "precision": (PRECISIONS.__contains__, f"one of {PRECISIONS}"),
    "checkpoint": (_is_hash, "a SHA-256 in hex"),
    "config": (_is(dict), "an object"),
    "files": (_are_hashes, "names of files with their SHA-256 in hex"),
    "versions": (_are_texts, "names of packages with their versions"),
    "options": (_is(dict), "an object"),
    "proof": (_is(dict), "an object"),
}
_OPTIONS: _Rules = {
    "opset": (_is_count, "a number"),
    "calibration": (_is(str), "pairs"),
    "module": (_is(str), "a name"),
    "version": (_is(str), "a version"),
    "gpu": (_is(str, type(None)), "a name or null"),
    "compute_capability": (_is_capability, "a number such as '8.9'"),
    "profile": (_is_profile, "a name, batches and lengths"),
    "onnx": (_are_hashes, "names of files with their SHA-256 in hex"),
    "structure": (_are_hashes, "names of files with their SHA-256 in hex"),
    "workspace": (lambda value: value is None or _is_count(value), "a number of MiB or null"),
    **dict.fromkeys(
        ("version_compatible", "hardware_compatible", "refittable", "stripped"), (_is(bool), "true or false")
    ),
}
_TRT_OPTIONS = set(_OPTIONS) - {"opset", "calibration"}
_PROOF: _Rules = {
    "passed": (_is(bool), "true or false"),
    "devices": (lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value), "names"),
}


def _require(values: dict[str, Any], rules: _Rules, path: Path) -> None:
    for name, (is_right, expected) in rules.items():
        if name in values and not is_right(values[name]):
            raise EngineError(f"{path}: {name}: expected {expected}, got {values[name]!r:.80}")


class Exports(NamedTuple):
    """Exports beside a checkpoint, and the reasons why others cannot be read, by the names of their folders."""

    exports: list[Export]
    damaged: dict[str, str]


def find(checkpoint: str | os.PathLike[str] | None, runtime: str, precision: str | None = None) -> Exports:
    """Find the exports beside a checkpoint, in the order of their folders' names.

    Args:
        checkpoint: Folder, file or name, as :func:`finelip_fast.load` takes it.
        runtime: ``"onnx"`` or ``"trt"``.
        precision: Precision of the exports; None means any.
    """
    exports = Exports([], {})
    place = exports_folder(checkpoint)
    try:
        folders = sorted(path.parent for path in place.glob(f"{runtime}-*/{MANIFEST}"))
    except OSError as error:  # belongs to someone else
        exports.damaged[place.name] = f"{place} cannot be read: {error.strerror}; check its permissions"
        return exports
    for folder in folders:
        try:
            export = read(folder)
            if export.manifest.runtime != runtime:
                raise EngineError(
                    f"{folder}: expected an export for {runtime}, found one for {export.manifest.runtime}"
                )
        except EngineError as error:
            # Only the folder's name tells what it should be.
            precisions = [name for name in PRECISIONS if f"{folder.name}-".startswith(f"{runtime}-{name}-")]
            if precision is None or precision in precisions:
                remedy = (
                    f"; {rebuild_command(checkpoint, runtime, precisions[-1])}"
                    if precisions
                    else ", or delete the folder"
                )
                exports.damaged[folder.name] = f"{error}{remedy}"
        else:
            if precision in (None, export.manifest.precision):
                exports.exports.append(export)
    return exports


def exports_folder(checkpoint: str | os.PathLike[str] | None) -> Path:
    """Folder of a checkpoint's exports: ``exports`` in its folder, or ``FILE.exports`` beside its file; for the bundled one
    and those of a hub, in this user's cache."""
    # Unlike the methods of Path, these never raise if a folder on the way belongs to someone else.
    if checkpoint is not None and os.path.exists(path := Path(os.path.expanduser(checkpoint))):
        return path / "exports" if os.path.isdir(path) else path.with_name(f"{path.name}.exports")
    name = "bundled" if checkpoint is None else re.sub(r"[^\w.-]+", "--", os.fspath(checkpoint))
    return cache_folder() / "exports" / name


def rebuild_arguments(
    checkpoint: str | os.PathLike[str] | None, runtime: str, precision: str, options: Sequence[str] = ()
) -> list[str]:
    """Arguments of ``finelip`` that make an export."""
    arguments = [] if checkpoint is None else [os.fspath(checkpoint)]
    return ["export", runtime, *arguments, "--precision", precision, *options]


def rebuild_command(
    checkpoint: str | os.PathLike[str] | None, runtime: str, precision: str, options: Sequence[str] = ()
) -> str:
    """Command line that makes an export."""
    return shlex.join(["finelip", *rebuild_arguments(checkpoint, runtime, precision, options)])
