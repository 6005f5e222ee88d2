"""Readers of caption files in JSON: plain JSON lines, and ShareGPT4V's published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finelip_fast._errors import InputError


def read_json_lines(path: Path, *, root: Path | None = None) -> list[tuple[Path, str]]:
    """One JSON object a line with ``image`` (a path) and ``caption``; other keys are left alone, blank lines too.

    Args:
        path: The file.
        root: Folder that relative picture paths start from; None: the file's own folder.

    Returns:
        ``(picture, caption)`` pairs in the file's order.

    Raises:
        InputError: A missing file, or a line that is not such an object; names the line.
    """
    pairs = []
    # Not splitlines(), which also splits at separators that may stand inside a JSON string.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            image, caption = item["image"], item["caption"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}, line {number}: expected a JSON object with 'image' and 'caption', got {line[:80]!r} ({error!r})"
            ) from None
        pairs.append(_pair(image, caption, root or path.parent, f"{path}, line {number}"))
    return pairs


def read_sharegpt4v(path: Path, *, root: Path | None = None) -> list[tuple[Path, str]]:
    """ShareGPT4V's JSON: a list of records with ``image`` and ``conversations``, the caption being the answer ``gpt`` gives.

    Published at https://sharegpt4v.github.io. Records without a picture (text-only conversations) are left out.

    Args:
        path: The file, such as ``share-captioner_coco_lcs_sam_1246k_1107.json``.
        root: Folder that holds ``coco/``, ``sam/``, ``llava/``; None: the file's own folder.

    Returns:
        ``(picture, caption)`` pairs in the file's order.

    Raises:
        InputError: A missing file, or one of another layout; names the record.
    """
    try:
        records = json.loads(_read(path))
    except ValueError as error:
        raise InputError(f"{path}: expected ShareGPT4V's JSON, a list of records: {error}") from None
    if not isinstance(records, list):
        raise InputError(f"{path}: expected ShareGPT4V's JSON, a list of records, got a {type(records).__name__}")
    pairs = []
    for index, record in enumerate(records):
        where = f"{path}, record {index}"
        if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
            raise InputError(f"{where}: expected an object with 'image' and 'conversations', got {str(record)[:80]}")
        if "image" not in record:
            continue
        turns = [turn for turn in record["conversations"] if isinstance(turn, dict)]
        answers = [turn.get("value") for turn in turns if turn.get("from") == "gpt"]
        if not answers:
            raise InputError(f"{where}: expected a turn from 'gpt' that holds the caption, got none")
        pairs.append(_pair(record["image"], answers[0], root or path.parent, where))
    return pairs


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text: {error}") from None


def _pair(image: Any, caption: Any, root: Path, where: str) -> tuple[Path, str]:
    if not isinstance(image, str) or not isinstance(caption, str):
        raise InputError(f"{where}: expected text for picture and caption, got {image!r:.80} and {caption!r:.80}")
    return root / image, caption
