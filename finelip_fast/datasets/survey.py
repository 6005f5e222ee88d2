"""What a dataset of pairs holds, known before any picture is encoded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from finelip_fast.datasets.base import PairDataset
from finelip_fast.errors import InputError


@dataclass(frozen=True)
class Survey:
    """Captions, and which picture each describes.

    Attributes:
        captions: Captions in the dataset's order.
        picture_of: Number of each caption's picture, in the order in which pictures first come.
        ids: Ids of the pictures, by number.
        first: Number of the pair that each picture is read from.
        stamps: Size in bytes and time of change in nanoseconds of pictures that are files, None of others; empty unless
            asked for.
        fingerprint: SHA-256 in hex of captions and pictures' names; equal for one dataset in different folders, since of a
            path only the last part counts.
    """

    captions: list[str]
    picture_of: list[int]
    ids: list[str]
    first: list[int]
    stamps: list[tuple[int, int] | None]
    fingerprint: str


def survey(pairs: PairDataset, *, stamps: bool = False) -> Survey:
    """Go through a dataset once; pictures that are drawn on demand are not drawn where the dataset can do without.

    Raises:
        InputError: No pairs.
    """
    if not len(pairs):
        raise InputError("expected at least one pair to evaluate, got none")
    look = getattr(pairs, "without_image", pairs.__getitem__)
    captions: list[str] = []
    picture_of: list[int] = []
    first: list[int] = []
    file_stamps: list[tuple[int, int] | None] = []
    numbers: dict[str, int] = {}
    for index in range(len(pairs)):
        example = look(index)
        number = numbers.setdefault(example.image_id, len(numbers))
        if number == len(first):
            first.append(index)
            if stamps:
                file_stamps.append(_stamp(example.image))
        captions.append(example.caption)
        picture_of.append(number)
    ids = list(numbers)
    names = [name.replace("\\", "/").rpartition("/")[2] for name in ids]
    fingerprint = hash_of([*names, *(f"{n} {text}" for n, text in zip(picture_of, captions, strict=True))])
    return Survey(captions, picture_of, ids, first, file_stamps, fingerprint)


def hash_of(texts: Iterable[str]) -> str:
    """SHA-256 in hex of texts, one after another and told apart."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.hexdigest()


def _stamp(image: Any) -> tuple[int, int] | None:
    if not isinstance(image, (str, os.PathLike)):
        return None
    try:
        status = os.stat(image)
    except (OSError, ValueError):  # said when the picture is read; ValueError: a name that no file can have
        return None
    return status.st_size, status.st_mtime_ns
