"""Metadata of a picture's file: its size, time and content, and what the camera recorded (EXIF)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from finelip_fast._decode import header, quiet, upright_size
from finelip_fast._files import file_hash, read_bytes
from finelip_fast._json import parse_json
from finelip_fast.errors import InputError

# Fields that show whether a file has changed.
STAMP = ("bytes", "modified")
HASH = "sha256"
# All fields that :func:`describe` may return.
FIELDS = (
    *(*STAMP, HASH, "width", "height", "taken", "camera", "lens", "orientation"),
    *("latitude", "longitude", "altitude"),
)

_MAX_SIDECAR = 1 << 22  # bytes
_FIRST, _LAST = datetime(1, 1, 2, tzinfo=timezone.utc), datetime(9999, 12, 31, tzinfo=timezone.utc)
_TIME = re.compile(r"(\d{4})[:-](\d\d)[:-](\d\d)[ T](\d\d):(\d\d):(\d\d)")
_OFFSET = re.compile(r"[+-]\d\d:\d\d|Z")


def stamp(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the size in bytes and the modification time (ISO 8601, UTC, microseconds) of a file.

    Times beyond the years 1 to 9999, which a file may have, count as the first or the last day of these.

    Raises:
        OSError: The file does not exist.
    """
    status = os.stat(path)
    seconds = min(max(status.st_mtime_ns // 1000 / 1e6, _FIRST.timestamp()), _LAST.timestamp())
    changed = datetime.fromtimestamp(seconds, timezone.utc)
    return {"bytes": status.st_size, "modified": changed.isoformat(timespec="microseconds")}


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata of a picture's file; fields that it does not have are left out.

    Args:
        path: File of a picture. One that cannot be decoded has only the fields of any file.

    Returns:
        ``bytes``, ``modified`` and ``sha256``; ``width`` and ``height`` in pixels, of the upright picture; and from EXIF
        ``taken`` (ISO 8601, with the offset if the camera recorded one), ``camera``, ``lens``, ``orientation`` (1 to 8),
        ``latitude`` and ``longitude`` in degrees, ``altitude`` in metres.

    Raises:
        OSError: The file cannot be read.
    """
    metadata = {**stamp(path), HASH: file_hash(path)}
    # Broken metadata is no reason to lose a sound picture.
    with suppress(Exception), quiet, header(os.fspath(path)) as (size, exif):
        held = exif.get(ExifTags.Base.Orientation)
        width, height = upright_size(size, held)
        metadata |= {"width": width, "height": height}
        metadata |= _camera_notes(exif, held)
    return metadata


def combine(described: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Add fields to what :func:`describe` returned; size, time and hash stay those of the file."""
    return {**described, **fields, **{name: described[name] for name in (*STAMP, HASH) if name in described}}


def _camera_notes(exif: Image.Exif, held: Any) -> dict[str, Any]:
    notes, place = exif.get_ifd(ExifTags.IFD.Exif), exif.get_ifd(ExifTags.IFD.GPSInfo)
    fields = {
        "taken": _time_taken(notes),
        "camera": _camera(_text(exif.get(ExifTags.Base.Make)), _text(exif.get(ExifTags.Base.Model))),
        "lens": _text(notes.get(ExifTags.Base.LensModel)),
        "orientation": int(held) if held in range(1, 9) else None,
        "latitude": _degrees(place, ExifTags.GPS.GPSLatitude, ExifTags.GPS.GPSLatitudeRef, "S", 90),
        "longitude": _degrees(place, ExifTags.GPS.GPSLongitude, ExifTags.GPS.GPSLongitudeRef, "W", 180),
        "altitude": _altitude(place),
    }
    return {name: value for name, value in fields.items() if value not in (None, "")}


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return " ".join(value.replace("\0", " ").split()) if isinstance(value, str) else ""


def _time_taken(notes: Mapping[int, Any]) -> str | None:
    """Time when the picture was taken, or when the film was scanned."""
    for time, offset in (
        (ExifTags.Base.DateTimeOriginal, ExifTags.Base.OffsetTimeOriginal),
        (ExifTags.Base.DateTimeDigitized, ExifTags.Base.OffsetTimeDigitized),
    ):
        match = _TIME.match(_text(notes.get(time)))
        zone = _OFFSET.fullmatch(_text(notes.get(offset)))
        with suppress(ValueError):  # from a camera whose clock was never set
            if match:
                return datetime(*map(int, match.groups())).isoformat() + (zone[0] if zone else "")  # type: ignore[arg-type]
    return None


def _camera(make: str, model: str) -> str:
    """Make and model; a make that the model begins with is not repeated."""
    first = make.split(" ")[0].lower()
    return model if model.lower().startswith(first) else f"{make} {model}".strip()


def _degrees(place: Mapping[int, Any], number: int, reference: int, negative: str, most: int) -> float | None:
    try:
        degrees, minutes, seconds = (float(part) for part in place[number])
        value = degrees + minutes / 60 + seconds / 3600
        value = -value if _text(place.get(reference)).upper() == negative else value
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return round(value, 7) if math.isfinite(value) and abs(value) <= most else None


def _altitude(place: Mapping[int, Any]) -> float | None:
    try:
        value = float(place[ExifTags.GPS.GPSAltitude])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    below = place.get(ExifTags.GPS.GPSAltitudeRef) in (1, b"\x01")
    return round(-value if below else value, 2) if math.isfinite(value) else None


def sidecar_names(path: Path) -> list[Path]:
    """Return the possible sidecar files of a picture: ``a.jpg.json``, as Google writes it, or ``a.json``."""
    return [path.with_name(f"{path.name}.json"), path.with_suffix(".json")]


def read_sidecar(path: Path) -> dict[str, Any]:
    """Read the fields in a JSON file beside a picture.

    Raises:
        InputError: The file cannot be read, or does not hold an object.
    """
    content = read_bytes(path, error=InputError, max_bytes=_MAX_SIDECAR)
    fields: dict[str, Any] = parse_json(content, path, error=InputError, expected="an object of fields", kind=dict)
    return fields
