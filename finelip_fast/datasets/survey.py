"""The contents of a dataset of pairs, surveyed before any picture is encoded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Any

from finelip_fast.datasets.base import PairDataset
from finelip_fast.errors import InputError


@dataclass(frozen=True)
class Survey:
    """Captions, and the picture that each describes.

    Attributes:
        captions: Captions in the dataset's order.
        picture_of: Number of each caption's picture; pictures are numbered by first appearance.
        ids: Ids of the pictures, by number.
        first: Number of the pair that each picture is read from.
        stamps: Size in bytes and modification time in nanoseconds of each picture that is a file, None for others; empty
            unless requested.
        fingerprint: SHA-256 in hex of captions and picture names; equal for one dataset in different folders, since only
            the last part of a path counts.
    """

    captions: list[str]
    picture_of: list[int]
    ids: list[str]
    first: list[int]
    stamps: list[tuple[int, int] | None]
    fingerprint: str


def survey(pairs: PairDataset, *, stamps: bool = False) -> Survey:
    """Go through a dataset once, without drawing pictures if the dataset offers pairs without them.

    Raises:
        InputError: There are no pairs, or ``pairs`` is the name of a dataset or a sequence of other things.
    """
    if isinstance(pairs, str):
        raise InputError(f"expected opened pairs, got the name {pairs!r:.80}; pass open_dataset({pairs!r:.80})")
    if not isinstance(pairs, Sized) or not hasattr(pairs, "__getitem__"):
        raise InputError(
            f"expected a sequence of pairs, got {pairs!r:.80}; finelip_fast.datasets.open_dataset opens one"
        )
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
        if not hasattr(example, "image_id"):
            raise InputError(
                f"expected pairs as finelip_fast.datasets.Example, got {example!r:.80}; open_dataset opens scenes and files "
                "as such"
            )
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
    """Hash texts in order with SHA-256 in hex; the boundaries between texts count."""
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
    except (OSError, ValueError):  # reported when the picture is read; ValueError: a name that no file can have
        return None
    return status.st_size, status.st_mtime_ns
