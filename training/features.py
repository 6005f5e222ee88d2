"""Token features of all pairs, computed once to train the aggregators while the encoders stay frozen.

A folder holds them in float16, split into parts of pictures and parts of captions. Parts are written atomically, so work done
before an interrupt is kept, and the same command resumes. ``features.json`` records what the features were computed from.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from finelip_fast._files import utf8_path, write_whole
from finelip_fast._json import stated_otherwise
from finelip_fast._quantities import readable_size
from finelip_fast.checkpoint.saving import add_weights
from finelip_fast.datasets import PairDataset
from finelip_fast.datasets.survey import Survey, survey
from finelip_fast.errors import ConfigError, FineLIPError, ImageError, TrainingError
from finelip_fast.frozen import freeze, why_not
from finelip_fast.kernels.cpu import LinearPrecision
from finelip_fast.model import FineLIP
from finelip_fast.tokenizer import encode_batch, expected_truncation

_logger = logging.getLogger(__name__)

_FORMAT = 2
_MAX_ABOUT = 1 << 16  # bytes of features.json
# Sizes that have no effect on features; the context's length is stated beside them.
_OF_SCORES = ("aggregated_tokens", "aggregator_hidden", "trained_aggregators", "alpha", "logit_bias", "context_length")
# Pictures and captions per part, about 13 MB with ViT-B/16.
_PICTURES, _CAPTIONS = 64, 256
# Number of parts that a process keeps open, each memory-mapped.
_OPEN = 256
# Bytes of the disk to leave free.
_SPARE = 1 << 28


@dataclass(frozen=True)
class Features:
    """Features of a dataset's pairs in a folder.

    Args:
        folder: Folder filled by :func:`compute`.
        known: Survey of the dataset.
    """

    folder: Path
    known: Survey

    def picture(self, index: int) -> Tensor:
        """Features of a pair's picture, float16 ``[1 + P, D]``, CLS first.

        Raises:
            ImageError: The picture could not be read when the features were computed.
        """
        part, row = divmod(self.known.picture_of[index], _PICTURES)
        file = _opened(self._picture_part(part))
        broken = json.loads(file.metadata()["broken"])
        if str(row) in broken:
            raise ImageError(broken[str(row)])
        features: Tensor = file.get_slice("features")[row]
        return features

    def caption(self, index: int) -> Tensor:
        """Features of a pair's caption, float16 ``[T, D]``, the end token last."""
        part, row = divmod(index, _CAPTIONS)
        file = _opened(self._caption_part(part))
        ends = file.get_tensor("ends")
        first, last = (0 if row == 0 else int(ends[row - 1])), int(ends[row])
        features: Tensor = file.get_slice("features")[first:last]
        return features

    def _picture_part(self, part: int) -> Path:
        return self.folder / f"pictures-{part:06}.safetensors"

    def _caption_part(self, part: int) -> Path:
        return self.folder / f"captions-{part:06}.safetensors"


def _opened(path: Path) -> Any:
    try:
        status = path.stat()
        return _kept_open(path, (status.st_ino, status.st_mtime_ns, status.st_size))
    except (OSError, safetensors.SafetensorError) as error:
        raise TrainingError(
            f"cannot read features from {path}: {error}; the same command computes them again"
        ) from None


@lru_cache(maxsize=_OPEN)
def _kept_open(path: Path, identity: tuple[int, int, int]) -> Any:
    """Open a part; ``identity`` changes with the file, for a folder that is removed and computed again."""
    with utf8_path(path) as readable:
        return safetensors.safe_open(readable, framework="pt")


def compute(
    model: FineLIP,
    pairs: PairDataset,
    folder: Path,
    *,
    precision: LinearPrecision = "fp32",
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
) -> Features:
    """Compute the missing features in a process's share of all pairs.

    Files that have changed since are encoded again, and pictures that could not be read are tried again.

    Args:
        model: Model whose encoders compute the features, on its device.
        pairs: Pairs of a map-style dataset; a picture with several pairs is encoded once.
        folder: Folder to fill, created if missing.
        precision: Precision of the encoders' linear layers; ``"int8"`` only on a CPU.
        rank, world: Rank of this process, and number of processes; the features are complete when all have finished.
        progress: Whether to show a progress bar.

    Raises:
        ConfigError: The folder holds features of other pairs, other encoders, another context or another precision, the disk
            has too little room for them, or the device does not support the precision.
        WriteError: A file cannot be written.
        TrainingError: The features are not finite, or exceed the range of float16.
    """
    known = survey(pairs, stamps=True)
    features = Features(folder, known)
    _check_folder(
        folder,
        {
            "format": _FORMAT,
            "encoders": _identity(model),
            "data": known.fingerprint,
            "context_length": model.config.context_length,
            "precision": precision,
        },
    )
    todo = _parts(model, features)
    missing = [part for part in todo[rank::world] if not _is_current(part, model, pairs, known)]
    size = sum(part.nbytes for part in missing)
    _check_room(folder, size)
    if missing:
        _logger.info(
            "features of %d pictures and %d captions: %s in %s, %s of them to compute",
            len(known.ids),
            len(known.captions),
            readable_size(sum(part.nbytes for part in todo)),
            folder,
            readable_size(size),
        )
    is_training, on_gpu = model.training, model.device.type == "cuda"
    encoders = encoders_of(model, precision) if missing else model
    is_hidden = not (progress and missing)
    with tqdm(total=size, unit="B", unit_scale=True, desc="features", disable=is_hidden) as bar, torch.inference_mode():
        for path, numbers, nbytes in missing:
            with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu and precision == "bf16"):
                if path.name.startswith("pictures"):
                    tensors, metadata = _encode_pictures(encoders, pairs, known, numbers)
                else:
                    tensors, metadata = _encode_captions(encoders, known.captions[numbers.start : numbers.stop])
            if not tensors["features"].isfinite().all():
                raise TrainingError(f"features of {path.stem} are too large for float16: train without --features")
            write_whole(path, partial(safetensors.torch.save_file, tensors, metadata=metadata), size=nbytes)
            bar.update(nbytes)
    model.train(is_training)
    return features


def missing_bytes(model: FineLIP, pairs: PairDataset, known: Survey, folder: Path) -> int:
    """Number of bytes that :func:`compute` has yet to write."""
    todo = _parts(model, Features(folder, known))
    return sum(part.nbytes for part in todo if not _is_current(part, model, pairs, known))


class _Part(NamedTuple):
    """A file of features, the numbers of its pictures or captions, and its size in bytes."""

    path: Path
    numbers: range
    nbytes: int


def _is_current(part: _Part, model: FineLIP, pairs: PairDataset, known: Survey) -> bool:
    """Return whether a part exists, is of its files as they are, and lacks no picture that can be read by now."""
    try:
        with utf8_path(part.path) as path, safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, safetensors.SafetensorError):  # missing or damaged
        return False
    if "broken" not in metadata:  # captions, which features.json identifies
        return True
    broken = json.loads(metadata["broken"])
    return metadata.get("stamps") == _stamps(known, part.numbers) and not any(
        _can_be_read(model, pairs, known, part.numbers[int(row)]) for row in broken
    )


def _can_be_read(model: FineLIP, pairs: PairDataset, known: Survey, number: int) -> bool:
    try:
        _pixels(model, pairs, known, number)
    except ImageError:
        return False
    return True


def _parts(model: FineLIP, features: Features) -> list[_Part]:
    """List every part of pictures, then every part of captions."""
    known, row_bytes = features.known, 2 * model.config.embed_dim
    with expected_truncation():
        lengths = encode_batch(known.captions, model.config.context_length, tokenizer=model.tokenizer).lengths
    picture_bytes = (1 + model.config.patches) * row_bytes
    pictures = [
        _Part(features._picture_part(part), numbers, len(numbers) * picture_bytes)
        for part, numbers in enumerate(_steps(len(known.ids), _PICTURES))
    ]
    captions = [
        _Part(features._caption_part(part), numbers, int(lengths[numbers.start : numbers.stop].sum()) * row_bytes)
        for part, numbers in enumerate(_steps(len(known.captions), _CAPTIONS))
    ]
    return pictures + captions


def encoders_of(model: FineLIP, precision: LinearPrecision) -> FineLIP:
    """Return a copy of the model with the fastest encoders for its device.

    Raises:
        ConfigError: The device does not support the precision.
    """
    on_cpu = model.device.type == "cpu"
    if not on_cpu and precision == "int8":
        raise ConfigError(f"expected feature_precision fp32 or bf16 on {model.device}, got 'int8', which is a CPU's")
    if on_cpu and (reason := why_not(precision)) is not None:
        raise ConfigError(f"expected another feature_precision than {precision!r}: {reason}; fp32 always works")
    encoders = copy.deepcopy(model).eval()
    return freeze(encoders, precision) if on_cpu else encoders


def _identity(model: FineLIP) -> str:
    """SHA-256 in hex of the encoders' weights and of all that affects what they compute.

    The aggregators' weights and the weight of the global score change in training.
    """
    sizes = {name: value for name, value in model.config.to_dict().items() if name not in _OF_SCORES}
    digest = hashlib.sha256(f"{json.dumps(sizes, sort_keys=True)}{model.preprocess!r}".encode())
    for encoder in (model.visual, model.text):
        add_weights(digest, encoder.state_dict())
    return digest.hexdigest()


def _encode_pictures(
    model: FineLIP, pairs: PairDataset, known: Survey, numbers: range
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Encode pictures as features ``[n, 1 + P, D]``, zeros for those that cannot be read, and collect the reasons."""
    side = model.config.image_size
    pixels, broken = torch.zeros(len(numbers), 3, side, side), {}
    for row, number in enumerate(numbers):
        try:
            pixels[row] = _pixels(model, pairs, known, number)
        except ImageError as error:
            broken[str(row)] = str(error)
    features = model.visual(pixels.to(model.device)).half().cpu()
    features[[int(row) for row in broken]] = 0
    metadata = {"broken": json.dumps(broken), "stamps": _stamps(known, numbers)}
    return {"features": features.contiguous()}, metadata


def _stamps(known: Survey, numbers: range) -> str:
    """Sizes and times of pictures that are files, as JSON."""
    return json.dumps(known.stamps[numbers.start : numbers.stop])


def _pixels(model: FineLIP, pairs: PairDataset, known: Survey, number: int) -> Tensor:
    """Read a picture as the model's pixels.

    Raises:
        ImageError: It cannot be read; the message names it.
    """
    try:
        return model.preprocess(pairs[known.first[number]].image)
    except ImageError:  # names the picture
        raise
    except (FineLIPError, OSError) as error:
        raise ImageError(f"{known.ids[number]}: {error}") from error


def _encode_captions(model: FineLIP, captions: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Encode captions as features ``[sum of T, D]`` of their tokens without padding, and the end of each caption."""
    with expected_truncation():
        ids = encode_batch(captions, model.config.context_length, tokenizer=model.tokenizer).ids
    tokens, lengths = model.text_tokens(ids.to(model.device))
    is_token = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    return {"features": tokens[is_token].half().cpu(), "ends": lengths.cpu().cumsum(0)}, {}


def _check_folder(folder: Path, about: dict[str, Any]) -> None:
    """Create the folder, or check that it holds the same features."""
    path = folder / "features.json"
    different = stated_otherwise(path, about, error=ConfigError, expected="what features are of", max_bytes=_MAX_ABOUT)
    if different:
        raise ConfigError(
            f"{folder} holds features of other {' and other '.join(different)}: give another --features, or remove it"
        )


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size + _SPARE > free:
        raise ConfigError(
            f"expected {readable_size(size + _SPARE)} of free space for features in {folder}, found {readable_size(free)}; "
            "pass --features on another disk, or use fewer pairs"
        )


def _steps(count: int, size: int) -> Iterator[range]:
    return (range(first, min(first + size, count)) for first in range(0, count, size))
