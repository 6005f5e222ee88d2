"""Token features of all pairs, computed once: aggregators are trained on them while the encoders stay as they are.

A folder holds them in float16, pictures and captions in parts. A part is written whole, so that what was computed before an
interrupt stays, and the same command goes on. ``features.json`` says whose features they are.
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
# What a part holds: some 13 MB of ViT-B/16.
_PICTURES, _CAPTIONS = 64, 256
# Parts that a process has open; each is mapped.
_OPEN = 256
# Bytes of the disk that are left to others.
_SPARE = 1 << 28


@dataclass(frozen=True)
class Features:
    """The features of a dataset's pairs in a folder.

    Args:
        folder: Folder that :func:`compute` has filled.
        known: What the dataset holds.
    """

    folder: Path
    known: Survey

    def picture(self, index: int) -> Tensor:
        """Features of a pair's picture, float16 ``[1 + P, D]``, CLS first.

        Raises:
            ImageError: The picture could not be read when they were computed.
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


@lru_cache(maxsize=_OPEN)
def _opened(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise TrainingError(
            f"cannot read features from {path}: {error}; remove the file, and the same command computes it again"
        ) from None


def compute(
    model: FineLIP,
    pairs: PairDataset,
    folder: Path,
    *,
    precision: LinearPrecision = "fp32",
    rank: int = 0,
    world: int = 1,
) -> Features:
    """Compute what is missing of a process's share of the features of all pairs, with progress.

    Args:
        model: Model whose encoders compute them, on its device.
        pairs: Pairs of a map-style dataset; of several pairs of one picture it is encoded once.
        folder: Folder to fill, made if missing.
        precision: Precision of the encoders' linear layers; ``"int8"`` on a CPU alone.
        rank, world: This process and how many there are; all features are there when the last is done.

    Raises:
        ConfigError: The folder holds features of other pairs, of other encoders or of another context; or the disk has no
            room for all of them; or the device does not have the precision.
        WriteError: The disk refuses.
        TrainingError: Features that float16 cannot hold.
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
    with tqdm(total=size, unit="B", unit_scale=True, desc="features", disable=None) as bar, torch.inference_mode():
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
    """Size of what :func:`compute` has yet to write of the features of pairs."""
    return sum(nbytes for path, _, nbytes in _parts(model, Features(folder, known)) if not path.exists())


def _parts(model: FineLIP, features: Features) -> list[tuple[Path, range, int]]:
    """Every part: its file, the numbers of its pictures or captions, and its size in bytes."""
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
    """A copy of the model whose encoders are as fast as this device has them.

    Raises:
        ConfigError: The device does not have the precision.
    """
    encoders = copy.deepcopy(model).eval()
    if model.device.type != "cpu":
        if precision == "int8":
            raise ConfigError(
                f"expected feature_precision fp32 or bf16 on {model.device}, got 'int8', which is a CPU's"
            )
        return encoders
    if (reason := why_not(precision)) is not None:
        raise ConfigError(f"expected another feature_precision than {precision!r}: {reason}; fp32 always works")
    return freeze(copy.deepcopy(model).eval(), precision)


def _identity(model: FineLIP) -> str:
    """SHA-256 in hex of the encoders' weights, and of whose tokens they read; those of the aggregators change."""
    digest = hashlib.sha256()
    for encoder in (model.visual, model.text):
        add_weights(digest, encoder.state_dict())
    digest.update(model.config.tokenizer.encode())
    return digest.hexdigest()


def _encode_pictures(
    model: FineLIP, pairs: PairDataset, known: Survey, numbers: range
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Features ``[n, 1 + P, D]``; of pictures that cannot be read zeros, and why."""
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
    """Features ``[sum of T, D]`` of the captions' own tokens, one caption after another, and where each ends."""
    with expected_truncation():
        ids = encode_batch(captions, model.config.context_length, tokenizer=model.tokenizer).ids
    tokens, lengths = model.text_tokens(ids.to(model.device))
    is_token = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    return {"features": tokens[is_token].half().cpu(), "ends": lengths.cpu().cumsum(0)}, {}


def _check_folder(folder: Path, about: dict[str, Any]) -> None:
    """Make the folder, or see that it is of the same features."""
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
            f"expected {size / 1e9:.1f} GB of room for features in {folder}, found {free / 1e9:.1f} GB: give --features on "
            "another disk, or fewer pairs"
        )


def _steps(count: int, size: int) -> Iterator[range]:
    return (range(first, min(first + size, count)) for first in range(0, count, size))
