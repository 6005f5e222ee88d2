"""Writing our own format, and verifying that the files on disk are what was written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from finelip_fast._arguments import floating_dtype, folder_path
from finelip_fast._files import expand_home, file_hash, write_error, write_set
from finelip_fast._json import parse_json
from finelip_fast._terminal import printable
from finelip_fast.checkpoint.architecture import Hints
from finelip_fast.checkpoint.building import Contents, build, not_finite
from finelip_fast.checkpoint.foreign import shortened
from finelip_fast.checkpoint.loading import FORMAT, Opened, open_checkpoint, read_config, warn_of, warn_of_averages
from finelip_fast.checkpoint.tokenizer_files import TOKENIZER
from finelip_fast.checkpoint.weight_files import damaged_records, shards
from finelip_fast.config import FineLIPConfig
from finelip_fast.errors import CheckpointError, InputError
from finelip_fast.model import FineLIP
from finelip_fast.tokenizer import CLIP_BPE, FileTokenizer, Tokenizer

_NO_EMBEDDING = ("alpha", "logit_bias")  # they affect scores, not embeddings
_MAX_METADATA = 1 << 20  # bytes; indentation makes it much larger


def save(
    model: FineLIP,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a model in our format.

    All files are written under temporary names before any is renamed, the configuration last. It is absent while an earlier
    checkpoint in the folder is replaced, so nobody reads the weights of one with the sizes of the other.

    Args:
        model: The model.
        folder: Folder to write; created if missing.
        dtype: Precision on disk. Default: the model's.
        metadata: JSON values to store with the model, such as where it comes from.

    Raises:
        InputError: An argument that is not a model, folder or dtype, metadata that JSON cannot hold, or weights that are NaN
            or infinite in this precision, by name.
        WriteError: The disk is full (says how much space is needed and free), or the folder is not writable.
    """
    folder = folder_path("folder", folder)
    if folder.is_file():
        raise InputError(f"expected a folder to write, got the file {str(folder)!r}; name another")
    if not isinstance(model, FineLIP):
        raise InputError(f"expected a FineLIP, got {model!r:.80}")
    dtype = None if dtype is None else floating_dtype("dtype", dtype)
    try:
        text = json.dumps({} if metadata is None else dict(metadata))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"expected metadata of plain values for JSON, got {metadata!r:.80}: {error}") from error
    if len(text) > _MAX_METADATA:
        raise InputError(f"expected at most {_MAX_METADATA} bytes of metadata, got {len(text)}")
    values = parse_json(text, "save", error=InputError, expected="metadata of plain values for JSON", kind=dict)
    content = model.tokenizer.content if isinstance(model.tokenizer, FileTokenizer) else b""
    if model.config.tokenizer != (hashlib.sha256(content).hexdigest() if content else ""):
        raise InputError(
            "expected a model with the tokenizer that its configuration names, got another: give both, "
            "FineLIP(config.replace(tokenizer=tokenizer.sha256), tokenizer)"
        )
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    if broken := not_finite(tensors):
        remedy = (
            "store it as float32: dtype=torch.float32, finelip convert --dtype float32"
            if not not_finite(model.state_dict())
            else "its training diverged: take an earlier checkpoint, and train with lower learning rates"
        )
        raise InputError(f"expected finite weights, got NaN or infinity in {shortened(broken)}; {remedy}")
    config = {"format": FORMAT, **model.config.to_dict()}

    def write_weights(path: Path) -> None:
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
        config["weights_sha256"] = file_hash(path)

    def write_config(path: Path) -> None:
        path.write_text(json.dumps({**config, "metadata": values}, indent=2) + "\n")

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    files = [
        (folder / TOKENIZER, lambda path: path.write_bytes(content), len(content)),
        (folder / "model.safetensors", write_weights, sum(tensor.nbytes for tensor in tensors.values())),
        (folder / "config.json", write_config, 0),
    ]
    write_set(files if content else files[1:])


def convert(
    source: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    context_length: int | None = None,
    dtype: torch.dtype | None = None,
    activation: str | None = None,
    heads: int | tuple[int, int] | None = None,
    key: str | None = None,
    alpha: float | None = None,
) -> dict[str, Any]:
    """Write a checkpoint in our format: any that :func:`load` reads, or weights whose missing configuration is given here.

    Args:
        source: Folder, file or name, as for :func:`load`. The metadata of one in our format is kept.
        out: Folder to write.
        context_length: Longest caption in tokens, as in :func:`load`.
        dtype: Precision on disk. Default: float32.
        activation, heads, key: Properties of weights without a configuration, as in :func:`import_state_dict`.
        alpha: Weight of the global cosine to store in the checkpoint. Default: the source's.

    Returns:
        A description of the result: ``layout``, ``parameters``, ``family``, ``trained_aggregators``, ``alpha``,
        ``embed_dim``, ``tokens``, ``image_size``, ``patch_size``, ``context_length``, ``activation``, ``heads`` (vision,
        text), ``dtype``, ``folder``.

    Raises:
        CheckpointError, ConfigError, InputError: Any error of :func:`load`; weights that ``dtype`` cannot hold;
            ``activation``, ``heads`` or ``key`` although a configuration already defines them; an ``alpha`` outside
            [0, 1], or below 1 if the aggregators are untrained.

    Warns:
        AveragedWeightsWarning: Under the same conditions as :func:`load`.
    """
    opened = open_checkpoint(source, context_length, Hints.checked(activation, heads, key))
    warn_of_averages(source, opened)
    layout = opened.layout
    config = opened.contents.config
    config = config.replace(alpha=config.choose_alpha(alpha))
    model = build(opened.contents._replace(config=config), FineLIP)
    history = _recorded(opened, "metadata")
    if not isinstance(history, (dict, NoneType)):
        raise CheckpointError(
            f"{opened.weights.parent / 'config.json'}: expected metadata as an object, found {history!r:.40}"
        )
    save(model, out, dtype=dtype, metadata={**(history or {}), "source": name_of(source), "layout": layout})
    return {
        "layout": layout,
        **_sizes(config),
        "dtype": str(dtype or model.dtype).removeprefix("torch."),
        "folder": os.fspath(out),
    }


def name_of(source: str | os.PathLike[str] | None) -> str:
    """Name of a checkpoint as it is recorded: the last part of a path, whose place on this machine is private."""
    if source is None:
        return "bundled"
    path = expand_home(source)
    name = os.path.basename(os.path.abspath(path)) if path.exists() else source
    return printable(name)  # a path may not be UTF-8, JSON must be


def _sizes(config: FineLIPConfig) -> dict[str, Any]:
    return {
        "parameters": config.parameters,
        "family": config.family,
        "trained_aggregators": config.trained_aggregators,
        "alpha": config.alpha,
        "embed_dim": config.embed_dim,
        "tokens": config.tokens,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "context_length": config.context_length,
        "activation": "quick_gelu" if config.quick_gelu else "gelu",
        "heads": [config.vision_heads, config.text_heads],
    }


def fingerprint(model: FineLIP | str | os.PathLike[str] | None) -> str:
    """Identify a checkpoint by what embeddings depend on: equal for equal weights and configurations, except ``alpha``.

    Args:
        model: A model, or anything that :func:`load` accepts. Casting a model to half precision changes its fingerprint.

    Returns:
        SHA-256 in hex of the configuration and every weight's name, shape and float32 values.

    Raises:
        CheckpointError: Under the same conditions as :func:`load`.
    """
    if isinstance(model, FineLIP):
        return _fingerprint(Contents(model.config, model.state_dict()))
    return _fingerprint(open_checkpoint(model, None).contents)


class Identity(NamedTuple):
    """The identity of a checkpoint: the sizes of its model, its fingerprint, and its tokenizer."""

    config: FineLIPConfig
    fingerprint: str
    tokenizer: Tokenizer = CLIP_BPE


def identify(checkpoint: str | os.PathLike[str] | None = None) -> Identity:
    """Identify a checkpoint from the weights in its file, without building the model.

    Args:
        checkpoint: Folder, file or name, as for :func:`load`.

    Raises:
        CheckpointError: Under the same conditions as :func:`load`.

    Warns:
        AveragedWeightsWarning, UntrainedAggregatorsWarning: Under the same conditions as :func:`load`.
    """
    opened = open_checkpoint(checkpoint, None)
    warn_of(checkpoint, opened)
    return Identity(opened.contents.config, _fingerprint(opened.contents), opened.contents.tokenizer)


def _fingerprint(contents: Contents) -> str:
    config = {name: value for name, value in contents.config.to_dict().items() if name not in _NO_EMBEDDING}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    add_weights(digest, contents.tensors)
    return digest.hexdigest()


def add_weights(digest: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    """Add every weight's name, shape and float32 values to a hash, in order of name."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().reshape(-1).numpy().data)


def verify(checkpoint: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Load a checkpoint, and compare its weight file with what was recorded when it was written.

    :func:`load` does not compare: hashing takes about as long as loading.

    Args:
        checkpoint: Folder, file or name, as for :func:`load`.

    Returns:
        ``format``: the layout. ``fingerprint``: as from :func:`fingerprint`. ``weights``: path of the weight file, or of the
        index of shards. ``sha256``: hash of that file. ``recorded_sha256``: hash in our ``config.json``; None if there is
        none. ``damaged``: records of a PyTorch file, or of shards, that do not match their own checksums; None if there
        are no checksums. ``status``: ``"ok"``, ``"mismatch"``, or ``"none recorded"`` if nothing can be compared.

    Raises:
        CheckpointError: Under the same conditions as :func:`load`.
    """
    opened = open_checkpoint(checkpoint, None)
    return {"format": opened.layout, "weights": os.fspath(opened.weights), **_compared(opened)}


def describe(checkpoint: str | os.PathLike[str] | None = None, *, verify: bool = False) -> dict[str, Any]:
    """Describe a checkpoint without building its model.

    Args:
        checkpoint: Folder, file or name, as for :func:`load`.
        verify: Whether to include the report of :func:`verify`.

    Returns:
        ``layout``, the sizes that :func:`convert` returns, and ``dtype``, the precision on disk. ``source``: what it was made
        of, as recorded in our ``config.json``; None if nothing is recorded. ``weights``: path of the weight file, or of the
        index of shards. ``bytes``: size of all weight files.

    Raises:
        CheckpointError: Under the same conditions as :func:`load`.
    """
    opened = open_checkpoint(checkpoint, None)
    weights, tensors = opened.weights, opened.contents.tensors.values()
    try:
        size = sum(path.stat().st_size for path in [weights, *shards(weights)])
    except OSError as error:
        raise CheckpointError(f"{weights}: cannot be read: {error}") from error
    metadata = _recorded(opened, "metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.is_floating_point()}
    return {
        "layout": opened.layout,
        **_sizes(opened.contents.config),
        "dtype": ", ".join(sorted(dtypes)),
        "source": metadata.get("source", metadata.get("base")),
        "weights": os.fspath(weights),
        "bytes": size,
        **(_compared(opened) if verify else {}),
    }


def _compared(opened: Opened) -> dict[str, Any]:
    """Compare a checkpoint's files with what was recorded of them."""
    weights, recorded = opened.weights, _recorded(opened, "weights_sha256")
    try:
        actual, damaged = file_hash(weights), _damaged([weights, *shards(weights)])
    except OSError as error:
        raise CheckpointError(f"{weights}: cannot be read: {error}") from error
    if recorded is None and damaged is None:
        status = "none recorded"
    else:
        status = "ok" if recorded in (None, actual) and not damaged else "mismatch"
    return {
        "fingerprint": _fingerprint(opened.contents),
        "sha256": actual,
        "recorded_sha256": recorded,
        "damaged": damaged,
        "status": status,
    }


def _recorded(opened: Opened, name: str) -> Any:
    """A value of our ``config.json`` that is not a size; None if there is no such file."""
    path = opened.weights.parent / "config.json"
    return read_config(path).get(name) if opened.layout == "finelip_fast" and path.is_file() else None


def _damaged(files: list[Path]) -> list[str] | None:
    """List the damaged records of a checkpoint's files; None if none of the files has checksums."""
    checked = [records for path in files if (records := damaged_records(path)) is not None]
    return [name for records in checked for name in records] if checked else None
