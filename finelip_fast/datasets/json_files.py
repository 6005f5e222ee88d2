"""Readers for JSON caption files: plain JSON lines, and ShareGPT4V's published layout.

Pictures are files. A caption file may name any file on this machine, even by an absolute path; a named file is read as a
picture or not at all.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from finelip_fast import _files, _json
from finelip_fast.errors import InputError

_MAX_BYTES = 1 << 32  # ShareGPT4V's 1.2 million records take a third of it
_MAX_PATH = 4096  # characters; no system accepts more
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def read_json_lines(path: Path, *, root: Path | None = None) -> list[tuple[Path, str]]:
    """Read one JSON object per line with ``image`` (a path) and ``caption``; other keys and blank lines are ignored.

    Args:
        path: The file.
        root: Folder that relative picture paths start from; None: the file's own folder.

    Returns:
        ``(picture, caption)`` pairs in the file's order.

    Raises:
        InputError: A missing file, or a line that is not such an object; names the line.
    """
    pairs = []
    expected = "a JSON object with 'image' and 'caption'"
    for where, item in _json.read_json_lines(
        path, error=InputError, expected=expected, max_bytes=_MAX_BYTES, surrogates=True
    ):
        if not {"image", "caption"} <= set(item):
            raise InputError(f"{where}: expected an object with 'image' and 'caption', got {_keys(item)}{_hint(item)}")
        pairs.append(_pair(item["image"], item["caption"], root or path.parent, where))
    return pairs


def read_sharegpt4v(path: Path, *, root: Path | None = None) -> list[tuple[Path, str]]:
    """Read ShareGPT4V's JSON, a list of records with ``image`` and ``conversations``; the caption is the answer by ``gpt``.

    Published at https://sharegpt4v.github.io. Records without a picture (text-only conversations) are left out.

    Args:
        path: The file, such as ``share-captioner_coco_lcs_sam_1246k_1107.json``.
        root: Folder that contains ``coco/``, ``sam/``, ``llava/``; None: the file's own folder.

    Returns:
        ``(picture, caption)`` pairs in the file's order.

    Raises:
        InputError: A missing file, or one with another layout; names the record.
    """
    expected = "ShareGPT4V's JSON, a list of records"
    # File names that are not UTF-8 are kept as Python writes them, with lone surrogates.
    records = _json.parse_json(read_text(path), path, error=InputError, expected=expected, surrogates=True)
    if not isinstance(records, list):
        raise InputError(f"{path}: expected {expected}, got {_keys(records)}{_hint(records)}")
    pairs = []
    for index, record in enumerate(records):
        where = f"{path}, record {index}"
        if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
            raise InputError(f"{where}: expected an object with 'image' and 'conversations', got {record!r:.80}")
        if "image" not in record:
            continue
        turns = [turn for turn in record["conversations"] if isinstance(turn, dict)]
        answers = [turn.get("value") for turn in turns if turn.get("from") == "gpt"]
        if not answers:
            raise InputError(f"{where}: expected a turn from 'gpt' that holds the caption, got none")
        pairs.append(_pair(record["image"], answers[0], root or path.parent, where))
    return pairs


def read_text(path: Path) -> str:
    """Read a text file of a data set, see :func:`finelip_fast._files.read_text`.

    Raises:
        InputError: No readable file, a pipe or a device, text that is not UTF-8, or more than 4 GiB.
    """
    return _files.read_text(path, error=InputError, max_bytes=_MAX_BYTES)


def picture_name(name: object, where: str) -> str:
    """Check that a name is one that a file could have.

    Raises:
        InputError: A name that is not text, is blank, contains NUL, is too long or cannot be encoded, or is a URL.
    """
    if (
        not isinstance(name, str)
        or not name.strip()
        or "\0" in name
        or len(name) > _MAX_PATH
        or not _is_encodable(name)
    ):
        raise InputError(f"{where}: expected the path of a picture, got {name!r:.80}")
    if _SCHEME.match(name):
        raise InputError(f"{where}: expected a picture that is a file, got {name!r:.80}; download it first")
    return name


def _pair(image: Any, caption: Any, root: Path, where: str) -> tuple[Path, str]:
    if not isinstance(image, str) or not isinstance(caption, str):
        raise InputError(f"{where}: expected text for picture and caption, got {image!r:.80} and {caption!r:.80}")
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: half of a surrogate pair in the caption {caption!r:.80}") from None
    return root / picture_name(image, where), caption


def _is_encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _keys(value: object) -> str:
    return f"the keys {sorted(map(str, value))!r:.80}" if isinstance(value, dict) else f"{value!r:.80}"


def _hint(value: object) -> str:
    """Say how to open a file in another known layout."""
    keys = set(value) if isinstance(value, dict) else set()
    layouts = {
        "COCO's layout, whose folder is opened as coco:ROOT": {"images", "annotations"},
        "DOCCI's layout, whose folder is opened as docci:ROOT:SPLIT": {"image_file", "description"},
        "DCI's layout, whose folder is opened as dci:ROOT:SPLIT": {"short_caption", "extra_caption"},
        "Flickr30k's layout, whose folder is opened as flickr30k:ROOT:SPLIT": {"images", "dataset"},
        "a record of ShareGPT4V's, whose file is opened as sharegpt4v:FILE": {"conversations"},
        "a pair of JSON lines, whose file is opened as jsonl:FILE": {"image", "caption"},
    }
    return next((f"; it is of {layout}" for layout, needed in layouts.items() if needed <= keys), "")
