"""Checkpoints: our own folder, and other projects' files.

Our format is one folder, read without pickle::

    config.json          {"format": "finelip_fast/1", the fields of FineLIPConfig, "weights_sha256": ..., "metadata": {...}}
    model.safetensors    the model's state dict, float32 or half precision

Everything else is translated when it is read (:mod:`finelip_fast._foreign`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import safetensors.torch
import torch
from torch import Tensor, nn

from finelip_fast._arguments import find_device, floating_dtype, folder_path, whole_number
from finelip_fast._files import write_error, write_whole
from finelip_fast._foreign import (
    LAYOUTS,
    config_from_open_clip,
    config_from_tensors,
    config_from_transformers,
    initial_aggregators,
    some,
    translate,
)
from finelip_fast._json import parse_json, read_json
from finelip_fast._weight_files import damaged_records, read_safetensors, read_weights
from finelip_fast.config import FineLIPConfig
from finelip_fast.encoders import stretch_positions
from finelip_fast.errors import CheckpointError, ConfigError, InputError
from finelip_fast.model import FineLIP

__all__ = [
    "UntrainedAggregatorsWarning",
    "config_from_open_clip",
    "convert",
    "fingerprint",
    "import_state_dict",
    "load",
    "save",
    "stretch_positions",
    "verify",
]

FORMAT = "finelip_fast/1"
BUNDLED = Path(__file__).parent / "data" / "scenes"

CLIP_CONTEXT = 77
LONG_CONTEXT = 256

# What a folder may hold: its configuration, and the names of its weights in the order of preference.
_WEIGHTS = {
    "finelip_fast": ("model.safetensors",),
    "open_clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    "transformers": ("model.safetensors", "pytorch_model.bin"),
}
_CONFIGS = ("config.json", "open_clip_config.json", "preprocessor_config.json")
# Bytes: what is read, and what is written of metadata, which indenting makes larger by far.
_MAX_CONFIG = 1 << 26
_MAX_METADATA = 1 << 20
# Parameters that a model may have beyond its weights before it is refused unbuilt.
_SMALL = 1 << 24
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

Describe = Callable[[Mapping[str, Tensor]], FineLIPConfig]


class UntrainedAggregatorsWarning(UserWarning):
    """The weights come from a CLIP without aggregators: fine scores mean nothing until they are trained."""


def load(
    checkpoint: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    context_length: int | None = None,
) -> FineLIP:
    """Load a model from our format or from another project's.

    ===========================  =====================================================================================
    ``checkpoint``               what is read
    ===========================  =====================================================================================
    None                         the model that comes with the library
    a folder                     ours, an open_clip hub folder, or transformers' ``CLIPModel``
    a file                       a state dict (``.pt``, ``.pth``, ``.bin``, ``.safetensors``) or OpenAI's TorchScript
                                 archive; recognised by its content. Without a configuration beside it, it is read as
                                 OpenAI's: quick GELU and a head for every 64 columns
    ``open_clip:MODEL/TAG``      open_clip's weights by name, ``open_clip:ViT-B-16/laion2b_s34b_b88k``
    ``open_clip:MODEL/FILE``     a file of weights for an open_clip model, for those that are not as OpenAI's
    ``org/name``                 a Hugging Face hub repository with one of the folders above; ``hf-hub:org/name`` too
    ===========================  =====================================================================================

    Args:
        checkpoint: As above.
        device: Where the model goes. Default: the CPU.
        dtype: Precision of the loaded model.
        context_length: Longest caption in tokens. Default: what the checkpoint holds, or 256 for plain CLIP with
            its 77. A larger one stretches the table of positions as it stands (:func:`stretch_positions`); a smaller
            one is refused.

    Returns:
        The model in eval mode, its parameters requiring gradients.

    Raises:
        CheckpointError: Nothing there, not reachable, no checkpoint, or one that this library cannot run.
        ConfigError: A ``context_length`` below the checkpoint's positions.
        EngineError: A device that is not here.
        InputError: An argument of another kind.

    Warns:
        UntrainedAggregatorsWarning: The checkpoint has no trained aggregators; the model scores by its global cosine.
    """
    place, dtype = find_device("cpu" if device is None else device), floating_dtype("dtype", dtype)
    model, layout, _ = _open(checkpoint, context_length)
    if not model.config.trained_aggregators:
        warnings.warn(
            f"{checkpoint} ({layout}) has no trained aggregators: its fine scores mean nothing, so alpha=1 is used and "
            "only the global cosine counts. Train them with training/train.py, or load a FineLIP checkpoint.",
            UntrainedAggregatorsWarning,
            stacklevel=2,
        )
    return model.to(device=place, dtype=dtype)


def save(
    model: FineLIP,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a model in our format.

    Each file is written beside its place and renamed, the configuration last: a reader meets a whole file or none.

    Args:
        model: The model.
        folder: Where to; made where it is missing.
        dtype: Precision on disk. Default: the model's.
        metadata: Values for JSON to keep with it, such as where it comes from.

    Raises:
        InputError: No model, folder or dtype, or metadata that JSON cannot hold.
        WriteError: The disk is full, or the folder someone else's; says how much is missing.
    """
    folder = folder_path("folder", folder)
    if not isinstance(model, FineLIP):
        raise InputError(f"expected a FineLIP, got {model!r:.80}")
    dtype = None if dtype is None else floating_dtype("dtype", dtype)
    try:
        kept = json.dumps({} if metadata is None else dict(metadata))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"expected metadata of plain values for JSON, got {metadata!r:.80}: {error}") from error
    if len(kept) > _MAX_METADATA:
        raise InputError(f"expected at most {_MAX_METADATA} bytes of metadata, got {len(kept)}")
    values = parse_json(kept, "save", error=InputError, expected="metadata of plain values for JSON", kind=dict)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    digests = []

    def write(path: Path) -> None:
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
        digests.append(_sha256(path))

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    write_whole(folder / "model.safetensors", write, size=sum(tensor.nbytes for tensor in tensors.values()))
    config = {"format": FORMAT, **model.config.to_dict(), "weights_sha256": digests[0], "metadata": values}
    write_whole(folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def convert(
    source: str | os.PathLike[str] | None,
    folder: str | os.PathLike[str],
    *,
    context_length: int | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Write any checkpoint that :func:`load` reads in our format.

    Args:
        source: As :func:`load` takes it. A folder of ours passes its metadata on.
        folder: Where to.
        context_length: As in :func:`load`.
        dtype: Precision on disk. Default: float32.

    Returns:
        What was written: ``layout``, ``parameters``, ``trained_aggregators``, ``embed_dim``, ``tokens``,
        ``image_size``, ``patch_size``, ``context_length``, ``dtype``, ``folder``.

    Raises:
        CheckpointError, ConfigError, InputError: As :func:`load`.
    """
    model, layout, _ = _open(source, context_length)
    # A path's last part: where it lay on one machine is no one else's business.
    name = "bundled" if source is None else Path(source).name if Path(source).exists() else os.fspath(source)
    ours = Path(source) / "config.json" if source is not None and layout == "finelip_fast" else None
    history = _read_config(ours).get("metadata") if ours is not None and ours.is_file() else {}
    if not isinstance(history, dict):
        raise CheckpointError(f"{ours}: expected metadata as an object, found {history!r:.40}")
    save(model, folder, dtype=dtype, metadata={**history, "source": name, "layout": layout})
    config = model.config
    return {
        "layout": layout,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_aggregators": config.trained_aggregators,
        "embed_dim": config.embed_dim,
        "tokens": config.tokens,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "context_length": config.context_length,
        "dtype": str(dtype or model.dtype).removeprefix("torch."),
        "folder": os.fspath(folder),
    }


def fingerprint(model: FineLIP | str | os.PathLike[str] | None) -> str:
    """Identify a checkpoint: equal for equal configurations and weights.

    Args:
        model: A model, or what :func:`load` takes. Casting a model to half precision changes its fingerprint.

    Returns:
        SHA-256 in hex, over the configuration and every weight's name, shape and float32 values.

    Raises:
        CheckpointError: As :func:`load`.
    """
    if not isinstance(model, FineLIP):
        model = _open(model, None).model
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\n{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().reshape(-1).numpy())
    return digest.hexdigest()


def verify(checkpoint: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Load a checkpoint, and compare the file of its weights with what was recorded when it was written.

    :func:`load` does not compare: hashing takes about as long as loading.

    Args:
        checkpoint: As :func:`load` takes it.

    Returns:
        ``format``: whose layout it is. ``fingerprint``: as :func:`fingerprint`. ``weights``: the file's path. ``sha256``: of
        that file. ``recorded_sha256``: by our ``config.json``; None where there is none. ``damaged``: records of a PyTorch
        file that are not what their own checksums say; None where the file has none. ``status``: ``"ok"``,
        ``"mismatch"``, or ``"none recorded"`` where nothing can be compared.

    Raises:
        CheckpointError: As :func:`load`.
    """
    model, layout, weights = _open(checkpoint, None)
    ours = weights.parent / "config.json"
    recorded = _read_config(ours).get("weights_sha256") if layout == "finelip_fast" and ours.is_file() else None
    try:
        actual, damaged = _sha256(weights), damaged_records(weights)
    except OSError as error:
        raise CheckpointError(f"{weights}: cannot be read: {error}") from error
    if recorded is None and damaged is None:
        status = "none recorded"
    else:
        status = "ok" if recorded in (None, actual) and not damaged else "mismatch"
    return {
        "format": layout,
        "fingerprint": fingerprint(model),
        "weights": os.fspath(weights),
        "sha256": actual,
        "recorded_sha256": recorded,
        "damaged": damaged,
        "status": status,
    }


def import_state_dict(
    state_dict: Mapping[str, Any],
    *,
    context_length: int | None = None,
    quick_gelu: bool = True,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> FineLIP:
    """Build a model from another project's state dict.

    The layouts are those of OpenAI CLIP, open_clip, Long-CLIP, FineLIP's authors, transformers' ``CLIPModel`` and our
    own. All sizes come from the tensors. Without a ``cross_net`` (FineLIP) the aggregators are at a fixed random start
    and ``config.trained_aggregators`` is False.

    Args:
        state_dict: Names to tensors of any float dtype. Wrappers' ``module.`` and entries without weights are ignored.
        context_length: As in :func:`load`.
        quick_gelu: Which GELU the weights were trained with: True for OpenAI's and all that started from them.
        vision_heads, text_heads: Attention heads. Default: one for every 64 columns of width.

    Returns:
        A float32 model in eval mode on the CPU, sharing no memory with ``state_dict``.

    Raises:
        CheckpointError: Missing, unknown or misshapen weights, by name; heads that must be given.
        ConfigError: Heads that do not divide the width, or a ``context_length`` below the table's rows.
    """
    describe = partial(config_from_tensors, quick_gelu=quick_gelu, vision_heads=vision_heads, text_heads=text_heads)
    return _translated(state_dict, describe, "the state dict", context_length)[0]


# ---- Where a checkpoint is


class _Opened(NamedTuple):
    model: FineLIP
    layout: str
    weights: Path


def _open(checkpoint: str | os.PathLike[str] | None, context_length: int | None) -> _Opened:
    """The model behind a name, the layout that it came in, and the file of its weights."""
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


def _open_folder(folder: Path, context_length: int | None, weights: Path | None = None) -> _Opened:
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
        return _Opened(_open_ours(folder / "config.json", weights, context_length), kind, weights)
    if kind == "open_clip":
        path = folder / "open_clip_config.json"
        values = _read_config(path)
        described = _described(
            path, config_from_open_clip, values.get("model_cfg", values), values.get("preprocess_cfg")
        )
        return _import(weights, lambda tensors: described, str(weights), context_length)
    pictures = folder / "preprocessor_config.json"
    describe = partial(
        config_from_transformers,
        config=_read_config(folder / "config.json"),
        preprocessor=_read_config(pictures) if pictures.is_file() else None,
    )
    return _import(weights, describe, str(weights), context_length)


def _read_config(path: Path) -> dict[str, Any]:
    return read_json(
        path, error=CheckpointError, expected="a model's configuration in JSON", kind=dict, max_bytes=_MAX_CONFIG
    )


def _described(where: object, describe: Callable[..., FineLIPConfig], *arguments: Any) -> FineLIPConfig:
    """A configuration, or an error that says whose."""
    try:
        return describe(*arguments)
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"{where}: {error}") from error


def _folder_kind(folder: Path) -> str | None:
    """Whose folder it is, a key of ``_WEIGHTS``; None for nobody's."""
    config = _read_config(folder / "config.json") if (folder / "config.json").is_file() else {}
    if str(config.get("format", "")).startswith("finelip_fast/"):
        return "finelip_fast"
    if (folder / "open_clip_config.json").is_file():
        return "open_clip"
    return "transformers" if config.get("model_type") == "clip" else None


def _open_ours(path: Path, weights: Path, context_length: int | None) -> FineLIP:
    values = _read_config(path)
    if values.pop("format") != FORMAT:
        raise CheckpointError(f"{path}: expected format {FORMAT!r}, a newer library wrote it: upgrade finelip-fast")
    for name in ("metadata", "weights_sha256"):
        values.pop(name, None)
    try:
        config = FineLIPConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: no sizes of a model: {error}") from error
    tensors = read_safetensors(weights)
    _check_room(config, tensors, str(weights))
    model = _build(config, tensors, str(weights))
    return _lengthen(model, context_length or config.context_length, str(weights))


def _open_file(path: Path, context_length: int | None) -> _Opened:
    # A file by one of the known names belongs to the configuration beside it; any other stands alone.
    known = any(path.name in names for names in _WEIGHTS.values())
    kind = _folder_kind(path.parent) if known else None
    if kind is not None and path.name in _WEIGHTS[kind]:
        return _open_folder(path.parent, context_length, weights=path)
    return _import(path, config_from_tensors, str(path), context_length)


def _open_by_open_clip_name(name: str, context_length: int | None) -> _Opened:
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
    config = config_from_open_clip(open_clip.get_model_config(model_name), pretrained)
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


# ---- From weights to a model


def _import(path: Path, describe: Describe, source: str, context_length: int | None) -> _Opened:
    return _Opened(*_translated(read_weights(path), describe, source, context_length), path)


def _translated(
    entries: Mapping[str, Any], describe: Describe, source: str, context_length: int | None
) -> tuple[FineLIP, str]:
    try:
        found = translate(entries)
        config = describe(found.tensors).replace(trained_aggregators=found.has_aggregators)
        tensors = found.tensors
        logits = tensors.get("image_aggregator.logits.weight")
        if found.has_aggregators and logits is not None and logits.dim() == 2:
            config = config.replace(aggregated_tokens=logits.shape[0], aggregator_hidden=logits.shape[1])
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"{source}: {error}") from error
    _check_room(config, tensors, source)
    if not found.has_aggregators:
        tensors = {**tensors, **initial_aggregators(config)}
    model = _build(config, tensors, source, found.names)
    longer = LONG_CONTEXT if config.context_length <= CLIP_CONTEXT else config.context_length
    return _lengthen(model, context_length or longer, source), found.layout


def _check_room(config: FineLIPConfig, tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse sizes far beyond the weights before anything is made of them; which weights are missing, the model tells."""
    held = sum(tensor.numel() for tensor in tensors.values())
    if config.parameters > 2 * held + _SMALL:
        raise CheckpointError(
            f"{source}: expected the weights of a model of {config.parameters} parameters, as it is configured, found {held}"
        )


def _build(
    config: FineLIPConfig, tensors: Mapping[str, Tensor], source: str, names: Mapping[str, str] | None = None
) -> FineLIP:
    """A float32 model on the CPU with exactly these weights, copied."""
    # On the meta device nothing is drawn at random: quick, and the caller's random numbers stay as they were.
    with torch.device("meta"):
        model = FineLIP(config)
    expected = model.state_dict()
    misshapen = [
        f"{name} {list(tensor.shape)} {tensor.dtype}, expected {list(expected[name].shape)}"
        for name, tensor in tensors.items()
        if name in expected and (tensor.shape != expected[name].shape or not tensor.is_floating_point())
    ]
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unknown": [(names or {}).get(name, name) for name in tensors if name not in expected],
        "misshapen": misshapen,
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {some(which)}" for what, which in problems.items() if which)
        raise CheckpointError(f"{source}: expected the {len(expected)} weights of {LAYOUTS}; {found}")
    model.load_state_dict(
        {
            name: tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        },
        assign=True,
    )
    model.text.attn_mask = model.text.build_causal_mask()  # a buffer that no state dict carries
    return model.eval()


def _lengthen(model: FineLIP, length: int, source: str) -> FineLIP:
    """Stretch the model's context to ``length`` tokens, in place."""
    rows, config = model.config.context_length, model.config.replace(context_length=length)
    if length < rows:
        raise ConfigError(
            f"expected context_length of at least {rows}, the positions of {source}, got {length}; "
            "shorter captions need no shorter table: tokenize them to the length you want"
        )
    if length > rows:
        text = model.text
        text.positional_embedding = nn.Parameter(stretch_positions(text.positional_embedding.detach(), length))
        text.num_pos = text.context_length = length
        text.attn_mask = text.build_causal_mask()
        model.config = config
    return model


def _listing(folder: Path) -> str:
    """A folder's contents for an error message, with what its config.json says of itself."""
    says = ""
    if (folder / "config.json").is_file():
        config = _read_config(folder / "config.json")
        says = f" (config.json has format {config.get('format')!r:.40}, model_type {config.get('model_type')!r:.40})"
    return some(sorted(entry.name for entry in folder.iterdir())) + says


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
