"""What the file of a picture says of itself: its size, time and content, and what the camera noted (EXIF)."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from finelip_fast._decode import header, open_without_waiting, quiet
from finelip_fast._files import read_bytes
from finelip_fast._json import parse_json
from finelip_fast.errors import InputError

# The fields that show whether a file is what it was.
STAMP = ("bytes", "modified")
HASH = "sha256"
# All that :func:`describe` may say.
FIELDS = (
    *(*STAMP, HASH, "width", "height", "taken", "camera", "lens", "orientation"),
    *("latitude", "longitude", "altitude"),
)

_MAX_SIDECAR = 1 << 22  # bytes
_PIECE = 1 << 20
_TIME = re.compile(r"(\d{4})[:-](\d\d)[:-](\d\d)[ T](\d\d):(\d\d):(\d\d)")
_OFFSET = re.compile(r"[+-]\d\d:\d\d|Z")
_TURNED = range(5, 9)  # orientations of pictures that lie on their side


def stamp(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Size in bytes and time of the last change (ISO 8601, UTC, microseconds) of a file.

    Raises:
        OSError: There is no such file.
    """
    status = os.stat(path)
    changed = datetime.fromtimestamp(status.st_mtime_ns // 1000 / 1e6, timezone.utc)
    return {"bytes": status.st_size, "modified": changed.isoformat(timespec="microseconds")}


def content_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, in hexadecimal digits.

    Raises:
        OSError: It cannot be read.
    """
    digest, piece = hashlib.sha256(), bytearray(_PIECE)
    with open(path, "rb", buffering=0, opener=open_without_waiting) as file:
        while count := file.readinto(piece):
            digest.update(memoryview(piece)[:count])
    return digest.hexdigest()


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Metadata of a picture's file; what it does not say is left out.

    Args:
        path: File of a picture. One that cannot be decoded has the fields of any file.

    Returns:
        ``bytes``, ``modified`` and ``sha256``; ``width`` and ``height`` in pixels, of the upright picture; and of EXIF
        ``taken`` (ISO 8601, with the offset where the camera noted one), ``camera``, ``lens``, ``orientation`` (1 to 8),
        ``latitude`` and ``longitude`` in degrees, ``altitude`` in metres.

    Raises:
        OSError: The file cannot be read.
    """
    metadata = {**stamp(path), HASH: content_hash(path)}
    # Broken metadata is no reason to lose a sound picture.
    with suppress(Exception), quiet, header(os.fspath(path)) as (size, exif):
        held = exif.get(ExifTags.Base.Orientation)
        width, height = reversed(size) if held in _TURNED else size
        metadata |= {"width": width, "height": height}
        metadata |= _camera_notes(exif, held)
    return metadata


def _camera_notes(exif: Image.Exif, held: Any) -> dict[str, Any]:
    notes, place = exif.get_ifd(ExifTags.IFD.Exif), exif.get_ifd(ExifTags.IFD.GPSInfo)
    fields = {
        "taken": _taken(notes),
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


def _taken(notes: Mapping[int, Any]) -> str | None:
    """When the shutter was released, or a film was scanned."""
    for time, offset in (
        (ExifTags.Base.DateTimeOriginal, ExifTags.Base.OffsetTimeOriginal),
        (ExifTags.Base.DateTimeDigitized, ExifTags.Base.OffsetTimeDigitized),
    ):
        match = _TIME.match(_text(notes.get(time)))
        zone = _OFFSET.fullmatch(_text(notes.get(offset)))
        with suppress(ValueError):  # of a camera whose clock was never set
            if match:
                return datetime(*map(int, match.groups())).isoformat() + (zone[0] if zone else "")  # type: ignore[arg-type]
    return None


def _camera(make: str, model: str) -> str:
    """Maker and model, the maker once: models of some makers begin with it."""
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
    """Where notes on a picture may lie beside it: ``a.jpg.json``, as Google writes it, or ``a.json``."""
    return [path.with_name(f"{path.name}.json"), path.with_suffix(".json")]


def read_sidecar(path: Path) -> dict[str, Any]:
    """The fields in a file of JSON beside a picture.

    Raises:
        InputError: It cannot be read, or holds no object.
    """
    content = read_bytes(path, error=InputError, max_bytes=_MAX_SIDECAR)
    fields: dict[str, Any] = parse_json(content, path, error=InputError, expected="an object of fields", kind=dict)
    return fields
