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
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from finelip_fast._files import write_whole
from finelip_fast._json import stated_otherwise
from finelip_fast.checkpoint.saving import add_weights
from finelip_fast.datasets import PairDataset
from finelip_fast.datasets.survey import Survey, survey
from finelip_fast.errors import ConfigError, FineLIPError, ImageError, TrainingError
from finelip_fast.frozen import freeze, why_not
from finelip_fast.kernels.cpu import LinearPrecision
from finelip_fast.model import FineLIP
from finelip_fast.tokenizer import encode_batch, expected_truncation

_logger = logging.getLogger(__name__)

_FORMAT = 1
_MAX_ABOUT = 1 << 16  # bytes of features.json
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
            f"cannot read features from {path}: {error}; remove the file, and the same command computes it again"
        ) from None


@lru_cache(maxsize=_OPEN)
def _kept_open(path: Path, identity: tuple[int, int, int]) -> Any:
    """Open a part; ``identity`` changes with the file, for a folder that is removed and computed again."""
    return safetensors.safe_open(path, framework="pt")


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
    known = survey(pairs)
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
    missing = [entry for entry in todo[rank::world] if not entry[0].exists()]
    size = sum(nbytes for *_, nbytes in missing)
    _check_room(folder, size)
    if missing:
        _logger.info(
            "features of %d pictures and %d captions: %.1f GB in %s, %.1f GB of them to compute",
            len(known.ids),
            len(known.captions),
            sum(nbytes for *_, nbytes in todo) / 1e9,
            folder,
            size / 1e9,
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


def missing_bytes(model: FineLIP, known: Survey, folder: Path) -> int:
    """Number of bytes that :func:`compute` has yet to write."""
    return sum(nbytes for path, _, nbytes in _parts(model, Features(folder, known)) if not path.exists())


def _parts(model: FineLIP, features: Features) -> list[tuple[Path, range, int]]:
    """List every part: its file, the numbers of its pictures or captions, and its size in bytes."""
    known, row_bytes = features.known, 2 * model.config.embed_dim
    with expected_truncation():
        lengths = encode_batch(known.captions, model.config.context_length, tokenizer=model.tokenizer).lengths
    picture_bytes = (1 + model.config.patches) * row_bytes
    pictures = [
        (features._picture_part(part), numbers, len(numbers) * picture_bytes)
        for part, numbers in enumerate(_steps(len(known.ids), _PICTURES))
    ]
    captions = [
        (features._caption_part(part), numbers, int(lengths[numbers.start : numbers.stop].sum()) * row_bytes)
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
    """SHA-256 in hex of the encoders' weights and the tokenizer's name; the aggregators' weights change in training."""
    digest = hashlib.sha256()
    for encoder in (model.visual, model.text):
        add_weights(digest, encoder.state_dict())
    digest.update(model.config.tokenizer.encode())
    return digest.hexdigest()


def _encode_pictures(
    model: FineLIP, pairs: PairDataset, known: Survey, numbers: range
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Encode pictures as features ``[n, 1 + P, D]``, zeros for those that cannot be read, and collect the reasons."""
    side = model.config.image_size
    pixels, broken = torch.zeros(len(numbers), 3, side, side), {}
    for row, number in enumerate(numbers):
        try:
            pixels[row] = model.preprocess(pairs[known.first[number]].image)
        except ImageError as error:  # names the picture
            broken[str(row)] = str(error)
        except (FineLIPError, OSError) as error:
            broken[str(row)] = f"{known.ids[number]}: {error}"
    features = model.visual(pixels.to(model.device)).half().cpu()
    features[[int(row) for row in broken]] = 0
    return {"features": features.contiguous()}, {"broken": json.dumps(broken)}


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
            f"expected {size / 1e9:.1f} GB of free space for features in {folder}, found {free / 1e9:.1f} GB; pass --features "
            "on another disk, or use fewer pairs"
        )


def _steps(count: int, size: int) -> Iterator[range]:
    return (range(first, min(first + size, count)) for first in range(0, count, size))
