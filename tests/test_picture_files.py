"""Metadata of picture files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image

from finelip_fast.errors import InputError
from finelip_fast.picture_files import describe, read_sidecar, sidecar_names

BASE, GPS = ExifTags.Base, ExifTags.GPS


def save(
    path: Path, *, camera: dict[int, Any] | None = None, notes: dict[int, Any] | None = None, place: Any = None
) -> Path:
    image = Image.new("RGB", (40, 30), "red")
    exif = image.getexif()
    exif.update(camera or {})
    exif.get_ifd(ExifTags.IFD.Exif).update(notes or {})
    exif.get_ifd(ExifTags.IFD.GPSInfo).update(place or {})
    image.save(path, exif=exif)
    return path


def test_a_file_says_what_it_is_and_the_camera_what_it_noted(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.jpg",
        camera={BASE.Make: "Canon\0", BASE.Model: "Canon EOS R5", BASE.Orientation: 6},
        notes={
            BASE.DateTimeOriginal: "2024:06:01 18:30:05",
            BASE.OffsetTimeOriginal: "+02:00",
            BASE.LensModel: "RF24-105mm F4 L IS USM",
        },
        place={
            GPS.GPSLatitude: (48.0, 51.0, 29.6),
            GPS.GPSLatitudeRef: "N",
            GPS.GPSLongitude: (70.0, 17.0, 40.2),
            GPS.GPSLongitudeRef: "W",
            GPS.GPSAltitude: 35.5,
            GPS.GPSAltitudeRef: b"\x01",
        },
    )
    os.utime(path, ns=(0, 1_700_000_000_123_456_789))
    assert describe(path) == {
        "bytes": path.stat().st_size,
        "modified": "2023-11-14T22:13:20.123456+00:00",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "width": 30,
        "height": 40,
        "orientation": 6,  # upright
        "taken": "2024-06-01T18:30:05+02:00",
        "camera": "Canon EOS R5",
        "lens": "RF24-105mm F4 L IS USM",
        "latitude": 48.8582222,
        "longitude": -70.2945,
        "altitude": -35.5,
    }


@pytest.mark.parametrize(
    ("make", "model", "camera"),
    [
        ("NIKON CORPORATION", "NIKON D750", "NIKON D750"),
        ("Apple", "iPhone 15 Pro", "Apple iPhone 15 Pro"),
        ("FUJIFILM", "", "FUJIFILM"),
        ("", "X100", "X100"),
    ],
)
def test_a_camera_is_named_with_its_maker_once(tmp_path: Path, make: str, model: str, camera: str) -> None:
    assert describe(save(tmp_path / "a.jpg", camera={BASE.Make: make, BASE.Model: model}))["camera"] == camera


@pytest.mark.parametrize(
    "notes",
    [
        {"notes": {BASE.DateTimeOriginal: "0000:00:00 00:00:00"}},
        {"notes": {BASE.DateTimeOriginal: "    :  :     :  :  "}},
        {"camera": {BASE.Make: "  "}, "notes": {BASE.LensModel: "\0\0"}},
        {"camera": {BASE.Orientation: 0}},
        {"place": {GPS.GPSLatitude: (0.0, 0.0), GPS.GPSLongitude: (500.0, 0.0, 0.0)}},
    ],
    ids=["clock never set", "blank", "empty texts", "no orientation", "places that are none"],
)
def test_notes_that_say_nothing_are_left_out(tmp_path: Path, notes: dict[str, Any]) -> None:
    assert describe(save(tmp_path / "a.jpg", **notes)).keys() == {"bytes", "modified", "sha256", "width", "height"}


def test_broken_metadata_loses_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path, exif=b"Exif\0\0garbage")
    assert describe(path)["width"] == 8
    path.write_bytes(b"no picture")
    assert describe(path).keys() == {"bytes", "modified", "sha256"}
    with pytest.raises(FileNotFoundError):
        describe(tmp_path / "none.jpg")


def test_notes_lie_beside_a_picture(tmp_path: Path) -> None:
    assert sidecar_names(tmp_path / "a.jpg") == [tmp_path / "a.jpg.json", tmp_path / "a.json"]
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"title": "dog"}')
    assert read_sidecar(tmp_path / "a.json") == {"title": "dog"}
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(InputError, match=r"a\.json: expected an object of fields: found a list"):
        read_sidecar(tmp_path / "a.json")
