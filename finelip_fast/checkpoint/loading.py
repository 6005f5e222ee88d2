"""Opening a checkpoint: our own folder, another project's folder or file, or a name on a hub."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from finelip_fast._arguments import whole_number
from finelip_fast._files import expand_home
from finelip_fast._json import read_json
from finelip_fast.checkpoint.architecture import (
    Hints,
    config_from_open_clip,
    config_from_transformers,
    config_from_weights,
)
from finelip_fast.checkpoint.building import Contents, Describe, check_room, check_weights, lengthen, translated
from finelip_fast.checkpoint.foreign import TRANSFORMERS, Translation, shortened
from finelip_fast.checkpoint.tokenizer_files import TOKENIZER, TOKENIZER_FILES, foreign_tokenizer, own_tokenizer
from finelip_fast.checkpoint.weight_files import INDEX, SHARD, read_safetensors, read_weights, shards
from finelip_fast.config import FineLIPConfig
from finelip_fast.errors import CheckpointError, ConfigError, InputError

FORMAT = "finelip_fast/1"
BUNDLED = Path(__file__).parent.parent / "data" / "scenes"

# The names of a folder's weight files, in order of preference, by the kind of configuration in the folder.
_OURS = ("model.safetensors",)
_OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_TRANSFORMERS = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
_WEIGHTS = {"finelip_fast": _OURS, "open_clip": (*_OPEN_CLIP, *_TRANSFORMERS), "transformers": _TRANSFORMERS}
_CONFIGS = ("config.json", "open_clip_config.json", "preprocessor_config.json", "processor_config.json")
_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
_MAX_CONFIG = 1 << 26  # bytes
_NO_HINTS = Hints()
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_FILE = re.compile(rf"hf-hub:({_HUB_NAME.pattern})/([^/\\]+)")


class UntrainedAggregatorsWarning(UserWarning):
    """The weights come from a CLIP without aggregators: until these are trained, there are only global embeddings."""


class AveragedWeightsWarning(UserWarning):
    """A training script's dictionary contains averaged weights besides those that are used."""


class Opened(NamedTuple):
    """A checkpoint before a model is built.

    Attributes:
        contents: The sizes and the weights, checked against each other.
        layout: Original layout of the weights.
        weights: The weight file, or the index of its shards.
        key: Key of a training script's dictionary that held the weights; empty if there is no such dictionary.
        averages: Keys of that dictionary that hold averaged weights, which were not used.
    """

    contents: Contents
    layout: str
    weights: Path
    key: str = ""
    averages: tuple[str, ...] = ()


def warn_of(checkpoint: str | os.PathLike[str] | None, opened: Opened, *, stacklevel: int = 3) -> None:
    """Warn about averaged weights that were not used, and about untrained aggregators."""
    warn_of_averages(checkpoint, opened, stacklevel=stacklevel + 1)
    if not opened.contents.config.trained_aggregators:
        warnings.warn(
            f"{checkpoint} ({opened.layout}) has no trained aggregators: embeddings have only their global row, and only "
            "the global cosine counts (alpha=1). To train them, see finelip adapt --help.",
            UntrainedAggregatorsWarning,
            stacklevel=stacklevel,
        )


def warn_of_averages(checkpoint: str | os.PathLike[str] | None, opened: Opened, *, stacklevel: int = 3) -> None:
    """Warn about averaged weights that were not used."""
    if opened.averages:
        warnings.warn(
            f"{checkpoint} holds {opened.key} and {shortened(opened.averages)}: {opened.key} is used. For the averaged "
            f"weights: finelip convert FILE FOLDER --key {opened.averages[0]}, in Python convert(file, folder, key=...)",
            AveragedWeightsWarning,
            stacklevel=stacklevel,
        )


def open_checkpoint(
    checkpoint: str | os.PathLike[str] | None, context_length: int | None, hints: Hints = _NO_HINTS
) -> Opened:
    """Open the checkpoint behind a name; ``hints`` supply what weights without a configuration do not say."""
    context_length = None if context_length is None else whole_number("context_length", context_length)
    if checkpoint is None:
        if not BUNDLED.is_dir():
            raise CheckpointError(
                f"the bundled model {BUNDLED} is missing; reinstall finelip-fast, or name a checkpoint"
            )
        return _open_folder(BUNDLED, context_length, hints)
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise InputError(f"expected a checkpoint's path or name, got {checkpoint!r:.80}")
    if not os.fspath(checkpoint):
        raise InputError("expected a checkpoint's path or name, got ''; leave it out for the bundled model")
    name = os.fspath(checkpoint)
    path = expand_home(name)
    try:
        if path.is_dir():
            return _open_folder(path, context_length, hints)
        if path.is_file():
            return _open_file(path, context_length, hints)
        if name.startswith("open_clip:"):
            _refuse_hints(hints, name)
            return _open_by_open_clip_name(name, context_length)
        if match := _HUB_FILE.fullmatch(name):
            return _open_file(_download_file(*match.groups()), context_length, hints)
        hub_name = name.removeprefix("hf-hub:")
        if _HUB_NAME.fullmatch(hub_name) and path.suffix not in _SUFFIXES:
            return _open_folder(_download(hub_name), context_length, hints)
    except OSError as error:  # no permission, or too long for a name
        raise CheckpointError(f"{name:.200}: cannot be read: {error.strerror or error}") from error
    raise CheckpointError(
        f"{name:.200}: no such file or folder; expected a checkpoint's folder or file, 'open_clip:MODEL/WEIGHTS', "
        "or 'org/name' of a repository on the Hugging Face hub"
    )


def _open_folder(folder: Path, context_length: int | None, hints: Hints, weights: Path | None = None) -> Opened:
    kinds = _folder_kinds(folder)
    if not kinds:
        return _open_unconfigured(folder, context_length, hints)
    _refuse_hints(hints, folder)
    names = _WEIGHTS[kinds[0]]
    weights = weights or next((folder / name for name in names if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(
            f"{folder}: expected {' or '.join(names)} beside its configuration, found {_listing(folder)}"
        )
    if kinds == ["finelip_fast"]:
        return Opened(_open_ours(folder / "config.json", weights, context_length), kinds[0], weights)
    describe = partial(_described_by_folder, folder=folder, kinds=kinds)
    return _import(weights, describe, str(weights), context_length, tokenizer_folder=lambda: folder)


def _described_by_folder(translation: Translation, folder: Path, kinds: list[str]) -> FineLIPConfig:
    """Read the sizes from these weights' configuration: repositories may hold both transformers' and open_clip's."""
    if "open_clip" in kinds and not ("transformers" in kinds and translation.layout == TRANSFORMERS):
        path = folder / "open_clip_config.json"
        values = read_config(path)
        return _described(path, config_from_open_clip, values.get("model_cfg", values), values.get("preprocess_cfg"))
    pictures = read_config(folder / _CONFIGS[2]) if (folder / _CONFIGS[2]).is_file() else None
    if pictures is None and (folder / _CONFIGS[3]).is_file():  # written by transformers 5
        pictures = read_config(folder / _CONFIGS[3]).get("image_processor")
        pictures = pictures if isinstance(pictures, dict) else None
    return config_from_transformers(translation.tensors, read_config(folder / "config.json"), pictures)


def _open_unconfigured(folder: Path, context_length: int | None, hints: Hints) -> Opened:
    """Open a folder with one weight file, such as that of Long-CLIP's hub repository."""
    names = _lone_names(entry.name for entry in folder.iterdir() if entry.is_file())
    if len(names) == 1:
        return _open_file(folder / names[0], context_length, hints)
    raise CheckpointError(
        f"{folder}: expected config.json with format {FORMAT!r} or model_type 'clip', or open_clip_config.json, "
        f"found {_listing(folder)}; for weights that need no configuration, pass the path of their file"
    )


def _lone_names(names: Iterable[str]) -> list[str]:
    """List the weight files that need no configuration: not shards, nor names that configurations use for weights."""
    configured = {name for names in _WEIGHTS.values() for name in names}
    return sorted(
        name
        for name in names
        if name.endswith(_SUFFIXES) and "/" not in name and name not in configured and not SHARD.search(name)
    )


def _refuse_hints(hints: Hints, where: object) -> None:
    if options := [f"{name}={value!r:.40}" for name, value in hints._asdict().items() if value is not None]:
        raise InputError(
            f"{where}: expected no {', '.join(options)}, which are only for weights without a configuration; omit them"
        )


def read_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = read_json(
        path, error=CheckpointError, expected="a model's configuration in JSON", kind=dict, max_bytes=_MAX_CONFIG
    )
    return config


def _described(where: object, describe: Callable[..., FineLIPConfig], *arguments: Any) -> FineLIPConfig:
    """Read a configuration; errors say where it comes from."""
    try:
        return describe(*arguments)
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"{where}: {error}") from error


def _folder_kinds(folder: Path) -> list[str]:
    """List the kinds of configurations that a folder contains, as keys of ``_WEIGHTS``."""
    config = read_config(folder / "config.json") if (folder / "config.json").is_file() else {}
    if str(config.get("format", "")).startswith("finelip_fast/"):
        return ["finelip_fast"]
    kinds = {
        "open_clip": (folder / "open_clip_config.json").is_file(),
        "transformers": config.get("model_type") == "clip",
    }
    return [kind for kind, present in kinds.items() if present]


def _open_ours(path: Path, weights: Path, context_length: int | None) -> Contents:
    values = read_config(path)
    if values.pop("format") != FORMAT:
        raise CheckpointError(f"{path}: expected format {FORMAT!r}; a newer version wrote it, upgrade finelip-fast")
    for name in ("metadata", "weights_sha256"):
        values.pop(name, None)
    try:
        config = FineLIPConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: expected the sizes of a model: {error}") from error
    tensors = read_safetensors(weights)
    check_room(config, tensors, str(weights))
    check_weights(config, tensors, str(weights))
    contents = Contents(config, tensors, own_tokenizer(path.parent, config))
    return lengthen(contents, context_length or config.context_length, str(weights))


def _open_file(path: Path, context_length: int | None, hints: Hints) -> Opened:
    # A file with one of the known names belongs to the configuration beside it; any other file stands alone.
    known = any(path.name in names for names in _WEIGHTS.values())
    kinds = _folder_kinds(path.parent) if known else []
    if kinds and path.name in _WEIGHTS[kinds[0]]:
        return _open_folder(path.parent, context_length, hints, weights=path)
    if SHARD.search(path.name):
        raise CheckpointError(
            f"{path}: expected all weights, but the name is that of a shard; pass their folder, or the index beside it, "
            f"{SHARD.sub('', path.name)}{INDEX}"
        )
    return _import(path, partial(config_from_weights, hints=hints), str(path), context_length, hints.key)


def _open_by_open_clip_name(name: str, context_length: int | None) -> Opened:
    import open_clip  # takes two seconds

    model_name, _, tag = name.removeprefix("open_clip:").partition("/")
    if model_name not in open_clip.list_models():
        raise CheckpointError(
            f"{name:.200}: open_clip has no model {model_name!r:.80}; expected 'open_clip:MODEL/WEIGHTS', such as "
            "'open_clip:ViT-B-16/openai'; open_clip.list_models() lists the models"
        )
    pretrained = open_clip.get_pretrained_cfg(model_name, tag)
    file = expand_home(tag)
    if not pretrained and not file.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model_name))
        raise CheckpointError(
            f"{name}: expected a pretrained tag of {model_name} ({tags}) or a file as WEIGHTS, got {tag!r}"
        )
    # Before the download, so that unusable weights are not downloaded.
    config = config_from_open_clip(open_clip.get_model_config(model_name) or {}, pretrained)
    if pretrained:
        try:
            file = Path(open_clip.download_pretrained(pretrained))
        except Exception as error:  # clients and proxies raise errors of their own
            # A tag may have another activation than its model; open_clip has a separately named model for each.
            is_plain = not (open_clip.get_model_config(model_name) or {}).get("quick_gelu")
            path = f"open_clip:{model_name}{'-quickgelu' if config.quick_gelu and is_plain else ''}/PATH"
            raise _unreachable(name, pretrained.get("hf_hub") or pretrained.get("url"), error, path) from error

    def describe(translation: Translation) -> FineLIPConfig:
        if translation.activation == "quick_gelu" and not config.quick_gelu:
            raise CheckpointError(
                f"{model_name} uses plain GELU, but weights of {translation.layout} use quick GELU; pass the path of the file "
                "instead of an open_clip name"
            )
        return config

    def tokenizer_folder() -> Path:
        """Find the tokenizer beside a named file, or else fetch open_clip's own for this model."""
        if not pretrained and (file.parent / TOKENIZER).is_file():
            return file.parent
        text: dict[str, Any] = (open_clip.get_model_config(model_name) or {}).get("text_cfg", {})
        return _fetch(str(text.get("hf_tokenizer_name")), *TOKENIZER_FILES)

    return _import(file, describe, name, context_length, tokenizer_folder=tokenizer_folder)


def _download(name: str) -> Path:
    """Download a hub repository's configuration and the weights that belong to it; return their folder."""
    folder = _fetch(name, *_CONFIGS)
    kinds = _folder_kinds(folder)
    if not kinds:
        names = _lone_names(_files_on_hub(name, folder))
        if len(names) > 1:
            raise CheckpointError(
                f"{name}: expected a configuration or a single file of weights, found {shortened(names)}; choose a "
                f"file, such as hf-hub:{name}/{names[0]}"
            )
        return _fetch(name, *names) if names else folder
    if _has_tokenizer(folder, kinds[0]):
        folder = _fetch(name, *TOKENIZER_FILES)
    for weights in _WEIGHTS[kinds[0]]:
        folder = _fetch(name, weights)
        if (folder / weights).is_file():
            files = [path.name for path in shards(folder / weights)]
            return _fetch(name, *files) if files else folder
    return folder


def _has_tokenizer(folder: Path, kind: str) -> bool:
    """Tell whether a folder's configuration needs a tokenizer beside the weights: CLIP's comes with this library."""
    if kind == "finelip_fast":
        return bool(read_config(folder / "config.json").get("tokenizer"))
    if kind == "open_clip":
        values = read_config(folder / "open_clip_config.json")
        model_cfg = values.get("model_cfg", values)
        text = model_cfg.get("text_cfg") if isinstance(model_cfg, dict) else None
        return isinstance(text, dict) and "hf_tokenizer_name" in text
    return False


def _download_file(name: str, file: str) -> Path:
    path = _fetch(name, *_CONFIGS, file) / file
    if not path.is_file():
        raise CheckpointError(f"hf-hub:{name}/{file}: no such file on huggingface.co/{name}")
    return path


def _fetch(name: str, *files: str) -> Path:
    """Download those of the named files that a hub repository has; return their folder."""
    from huggingface_hub import snapshot_download  # slow to import, and needed only here

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # clients and proxies raise errors of their own
        raise _unreachable(name, f"{', '.join(files)} of huggingface.co/{name}", error) from error


def _files_on_hub(name: str, folder: Path) -> list[str]:
    """List a hub repository's files; without a network, those downloaded before."""
    from huggingface_hub import list_repo_files  # slow to import, and needed only here

    try:
        return list(list_repo_files(name))
    except Exception as error:  # clients and proxies raise errors of their own
        if names := [path.name for path in folder.iterdir()]:
            return names
        raise _unreachable(name, f"the list of files of huggingface.co/{name}", error) from error


def _unreachable(name: str, tried: object, error: Exception, path: str = "") -> CheckpointError:
    return CheckpointError(
        f"{name}: no such local file or folder, and the download failed; tried {tried}: "
        f"{type(error).__name__}: {error}. Check the name and the network, or download it elsewhere and pass its path"
        + (f": {path}" if path else "")
    )


def _listing(folder: Path) -> str:
    """List a folder's contents for an error message, with the format and model type in its config.json."""
    says = ""
    if (folder / "config.json").is_file():
        config = read_config(folder / "config.json")
        says = f" (config.json has format {config.get('format')!r:.40}, model_type {config.get('model_type')!r:.40})"
    return shortened(sorted(entry.name for entry in folder.iterdir())) + says


def _import(
    path: Path,
    describe: Describe,
    source: str,
    context_length: int | None,
    key: str | None = None,
    tokenizer_folder: Callable[[], Path] | None = None,
) -> Opened:
    contents, translation = translated(read_weights(path), describe, source, context_length, key)
    if contents.config.family == "siglip" and tokenizer_folder is not None:
        config, tokenizer = foreign_tokenizer(tokenizer_folder(), contents.config)
        contents = contents._replace(config=config, tokenizer=tokenizer)
    return Opened(contents, translation.layout, path, translation.key, translation.averages)
