"""Opening a checkpoint: our own folder, another project's folder or file, or a name on a hub."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import open_clip

from finelip_fast._arguments import whole_number
from finelip_fast._json import read_json
from finelip_fast.checkpoint.building import Contents, Describe, check_room, check_weights, lengthen, translated
from finelip_fast.checkpoint.foreign import (
    config_from_open_clip,
    config_from_tensors,
    config_from_transformers,
    shortened,
)
from finelip_fast.checkpoint.weight_files import read_safetensors, read_weights
from finelip_fast.config import FineLIPConfig
from finelip_fast.errors import CheckpointError, ConfigError, InputError

FORMAT = "finelip_fast/1"
BUNDLED = Path(__file__).parent.parent / "data" / "scenes"

# What a folder may hold: its configuration, and the names of its weights in the order of preference.
_WEIGHTS = {
    "finelip_fast": ("model.safetensors",),
    "open_clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    "transformers": ("model.safetensors", "pytorch_model.bin"),
}
_CONFIGS = ("config.json", "open_clip_config.json", "preprocessor_config.json")
_MAX_CONFIG = 1 << 26  # bytes
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class UntrainedAggregatorsWarning(UserWarning):
    """The weights come from a CLIP without aggregators: until they are trained, global embeddings are all that there is."""


class Opened(NamedTuple):
    """A checkpoint before a model is built.

    Attributes:
        contents: The sizes and the weights, checked against each other.
        layout: The layout that they came in.
        weights: The file of the weights.
    """

    contents: Contents
    layout: str
    weights: Path


def warn_if_untrained(checkpoint: str | os.PathLike[str] | None, opened: Opened, *, stacklevel: int = 3) -> None:
    """Warn that a checkpoint has the global score alone, where its aggregators are untrained."""
    if not opened.contents.config.trained_aggregators:
        warnings.warn(
            f"{checkpoint} ({opened.layout}) has no trained aggregators: an embedding is its global row alone, and only "
            "the global cosine counts (alpha=1). Train them with finelip train, or load a FineLIP checkpoint.",
            UntrainedAggregatorsWarning,
            stacklevel=stacklevel,
        )


def open_checkpoint(checkpoint: str | os.PathLike[str] | None, context_length: int | None) -> Opened:
    """What is behind a name."""
    context_length = None if context_length is None else whole_number("context_length", context_length)
    if checkpoint is None:
        if not BUNDLED.is_dir():
            raise CheckpointError(
                f"this installation lacks the bundled model {BUNDLED}: reinstall finelip-fast, or name a checkpoint"
            )
        return _open_folder(BUNDLED, context_length)
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise InputError(f"expected a checkpoint's path or name, got {checkpoint!r:.80}")
    name = os.fspath(checkpoint)
    path = _path(name)
    try:
        if path.is_dir():
            return _open_folder(path, context_length)
        if path.is_file():
            return _open_file(path, context_length)
        if name.startswith("open_clip:"):
            return _open_by_open_clip_name(name, context_length)
        hub_name, files = name.removeprefix("hf-hub:"), (".pt", ".pth", ".bin", ".safetensors")
        if _HUB_NAME.fullmatch(hub_name) and path.suffix not in files:
            return _open_folder(_download(hub_name), context_length)
    except OSError as error:  # of someone else, or too long for a name
        raise CheckpointError(f"{name:.200}: cannot be read: {error.strerror or error}") from error
    raise CheckpointError(
        f"{name:.200}: no such file or folder. Expected a checkpoint's folder or file, 'open_clip:MODEL/TAG', "
        "or 'org/name' of a Hugging Face hub repository"
    )


def _path(name: str) -> Path:
    return Path(os.path.expanduser(name))  # Path.expanduser raises where there is no such user


def _open_folder(folder: Path, context_length: int | None, weights: Path | None = None) -> Opened:
    kind = _folder_kind(folder)
    if kind is None:
        raise CheckpointError(
            f"{folder}: expected config.json with format {FORMAT!r} or model_type 'clip', or open_clip_config.json; "
            f"found {_listing(folder)}"
        )
    names = _WEIGHTS[kind]
    weights = weights or next((folder / name for name in names if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(
            f"{folder}: expected {' or '.join(names)} beside its configuration, found {_listing(folder)}"
        )
    if kind == "finelip_fast":
        return Opened(_open_ours(folder / "config.json", weights, context_length), kind, weights)
    if kind == "open_clip":
        path = folder / "open_clip_config.json"
        values = read_config(path)
        described = _described(
            path, config_from_open_clip, values.get("model_cfg", values), values.get("preprocess_cfg")
        )
        return _import(weights, lambda tensors: described, str(weights), context_length)
    pictures = folder / "preprocessor_config.json"
    describe = partial(
        config_from_transformers,
        config=read_config(folder / "config.json"),
        preprocessor=read_config(pictures) if pictures.is_file() else None,
    )
    return _import(weights, describe, str(weights), context_length)


def read_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = read_json(
        path, error=CheckpointError, expected="a model's configuration in JSON", kind=dict, max_bytes=_MAX_CONFIG
    )
    return config


def _described(where: object, describe: Callable[..., FineLIPConfig], *arguments: Any) -> FineLIPConfig:
    """A configuration, or an error that says whose."""
    try:
        return describe(*arguments)
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"{where}: {error}") from error


def _folder_kind(folder: Path) -> str | None:
    """Whose folder it is, a key of ``_WEIGHTS``; None for nobody's."""
    config = read_config(folder / "config.json") if (folder / "config.json").is_file() else {}
    if str(config.get("format", "")).startswith("finelip_fast/"):
        return "finelip_fast"
    if (folder / "open_clip_config.json").is_file():
        return "open_clip"
    return "transformers" if config.get("model_type") == "clip" else None


def _open_ours(path: Path, weights: Path, context_length: int | None) -> Contents:
    values = read_config(path)
    if values.pop("format") != FORMAT:
        raise CheckpointError(f"{path}: expected format {FORMAT!r}, a newer library wrote it: upgrade finelip-fast")
    for name in ("metadata", "weights_sha256"):
        values.pop(name, None)
    try:
        config = FineLIPConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: no sizes of a model: {error}") from error
    tensors = read_safetensors(weights)
    check_room(config, tensors, str(weights))
    check_weights(config, tensors, str(weights))
    return lengthen(Contents(config, tensors), context_length or config.context_length, str(weights))


def _open_file(path: Path, context_length: int | None) -> Opened:
    # A file by one of the known names belongs to the configuration beside it; any other stands alone.
    known = any(path.name in names for names in _WEIGHTS.values())
    kind = _folder_kind(path.parent) if known else None
    if kind is not None and path.name in _WEIGHTS[kind]:
        return _open_folder(path.parent, context_length, weights=path)
    return _import(path, config_from_tensors, str(path), context_length)


def _open_by_open_clip_name(name: str, context_length: int | None) -> Opened:
    model_name, _, tag = name.removeprefix("open_clip:").partition("/")
    if model_name not in open_clip.list_models():
        raise CheckpointError(
            f"{name:.200}: open_clip has no model {model_name!r:.80}; expected 'open_clip:MODEL/TAG' such as "
            "'open_clip:ViT-B-16/openai', and open_clip.list_models() names them"
        )
    pretrained = open_clip.get_pretrained_cfg(model_name, tag)
    file = _path(tag)
    if not pretrained and not file.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model_name))
        raise CheckpointError(f"{name}: expected a pretrained tag of {model_name} ({tags}) or a file, got {tag!r}")
    # Before the download: weights that cannot be used need not come.
    config = config_from_open_clip(open_clip.get_model_config(model_name) or {}, pretrained)
    if pretrained:
        try:
            file = Path(open_clip.download_pretrained(pretrained))
        except Exception as error:  # every client and proxy raises its own
            raise _unreachable(name, pretrained.get("hf_hub") or pretrained.get("url"), error) from error
    return _import(file, lambda tensors: config, name, context_length)


def _download(name: str) -> Path:
    """A hub repository's folder with a configuration and the one file of weights that it calls for."""
    from huggingface_hub import snapshot_download  # slow to import, and needed here alone

    def fetch(*files: str) -> Path:
        try:
            return Path(snapshot_download(name, allow_patterns=list(files)))
        except Exception as error:  # every client and proxy raises its own
            raise _unreachable(name, f"{', '.join(files)} of huggingface.co/{name}", error) from error

    folder = fetch(*_CONFIGS)
    for weights in _WEIGHTS.get(_folder_kind(folder) or "", ()):
        folder = fetch(weights)
        if (folder / weights).is_file():
            break
    return folder


def _unreachable(name: str, tried: object, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{name}: no such file or folder here, and the download failed; tried {tried}: "
        f"{type(error).__name__}: {error}. Check the name and the network, or download it elsewhere and give its path"
    )


def _listing(folder: Path) -> str:
    """A folder's contents for an error message, with what its config.json says of itself."""
    says = ""
    if (folder / "config.json").is_file():
        config = read_config(folder / "config.json")
        says = f" (config.json has format {config.get('format')!r:.40}, model_type {config.get('model_type')!r:.40})"
    return shortened(sorted(entry.name for entry in folder.iterdir())) + says


def _import(path: Path, describe: Describe, source: str, context_length: int | None) -> Opened:
    return Opened(*translated(read_weights(path), describe, source, context_length), path)
