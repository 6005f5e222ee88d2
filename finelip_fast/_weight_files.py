"""Files of weights: read by their content, never executed."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from finelip_fast._errors import CheckpointError
from finelip_fast._foreign import some


def read_weights(path: Path) -> Mapping[str, Any]:
    """A file's state dict. What kind of file it is, its content says: suffixes lie."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file: {error}") from error
    if head[:4] == b"PK\x03\x04":
        return _read_zip(path)
    if head[:1] == b"\x80":
        return _read_pickle(path, mmap=False)
    if head[8:] == b"{":
        return read_safetensors(path)
    found = f"a file that starts with {head!r}" if head else "an empty file"
    raise CheckpointError(f"{path}: expected a checkpoint (PyTorch, TorchScript or safetensors), found {found}")


def _read_zip(path: Path) -> Mapping[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path}: expected a PyTorch file, found a cut or damaged one: copy it again") from error
    if "constants.pkl" in names:
        try:
            with warnings.catch_warnings():
                # OpenAI's files are TorchScript and stay so, whatever becomes of the rest of it.
                warnings.simplefilter("ignore")
                return torch.jit.load(path, map_location="cpu").state_dict()
        except RuntimeError as error:
            raise CheckpointError(f"{path}: a TorchScript archive that cannot be read: {error}") from error
    if "data.pkl" in names:
        return _read_pickle(path, mmap=True)
    raise CheckpointError(f"{path}: expected a PyTorch file, found a zip archive with {some(names)}")


def _read_pickle(path: Path, *, mmap: bool) -> Mapping[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on how a file was pickled, which no reader can change
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: expected a state dict of tensors, found other Python objects, which are not executed here: "
            "where you trust it, load it and save its state dict again, torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise CheckpointError(f"{path}: expected a PyTorch file, found a damaged one: {error}") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file, found a damaged or cut one: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(values).__name__}")
    return values
