"""Formats of phones and cameras: read if their package is installed; otherwise the error names the package."""

from __future__ import annotations

import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from PIL import Image

from finelip_fast import _decode, open_image
from finelip_fast.errors import ImageError
from finelip_fast.folders import list_images
from finelip_fast.picture_files import describe
from finelip_fast.preprocess import Preprocess

WIDTH, HEIGHT = 96, 64


def picture() -> Image.Image:
    """Four colours in four quarters."""
    colours = np.array([[[220, 40, 40], [40, 200, 40]], [[40, 40, 220], [230, 230, 230]]], np.uint8)
    return Image.fromarray(colours.repeat(HEIGHT // 2, axis=0).repeat(WIDTH // 2, axis=1))


def save_heic(path: Path) -> None:
    pytest.importorskip("pillow_heif").from_pillow(picture()).save(path)


def save_jxl(path: Path) -> None:
    pytest.importorskip("pillow_jxl")
    picture().save(path)


def save_dng(path: Path) -> None:
    """Save an uncompressed DNG of an RGGB sensor, with an orientation of a turn to the right."""
    pytest.importorskip("rawpy")
    colours = np.asarray(picture())
    sensor = np.empty((HEIGHT, WIDTH), "<u2")
    for y, x, channel in ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 2)):
        sensor[y::2, x::2] = colours[y::2, x::2, channel].astype(np.uint16) * 257
    pixels = sensor.tobytes()
    kinds = {"H": 3, "I": 4, "B": 1}
    fields = {
        254: ("I", 0),
        256: ("I", WIDTH),
        257: ("I", HEIGHT),
        258: ("H", 16),
        259: ("H", 1),
        262: ("H", 32803),
        271: b"Maker\0",
        272: b"Model X\0",
        273: ("I", 0),
        274: ("H", 6),
        277: ("H", 1),
        278: ("I", HEIGHT),
        279: ("I", len(pixels)),
        284: ("H", 1),
        33421: ("H", 2, 2),
        33422: ("B", 0, 1, 1, 2),
        50706: ("B", 1, 4, 0, 0),
        50708: b"Model X\0",
        50717: ("H", 65535),
    }
    entries, extra = b"", b""
    base = 8 + 2 + 12 * len(fields) + 4
    for number, value in fields.items():
        if isinstance(value, bytes):
            kind, count, raw = 2, len(value), value
        else:
            kind, count, raw = kinds[value[0]], len(value) - 1, struct.pack(f"<{len(value) - 1}{value[0]}", *value[1:])
        if number == 273:
            raw = struct.pack("<I", base + 32)
        if len(raw) > 4:
            raw, extra = struct.pack("<I", base + len(extra)), extra + raw
        entries += struct.pack("<HHI", number, kind, count) + raw.ljust(4, b"\0")
    header = struct.pack("<2sHIH", b"II", 42, 8, len(fields)) + entries + struct.pack("<I", 0)
    path.write_bytes(header + extra.ljust(32, b"\0") + pixels)


SAVE = {".heic": save_heic, ".jxl": save_jxl, ".dng": save_dng, ".avif": lambda path: picture().save(path)}
PACKAGES = {".heic": ("pillow_heif", "heic"), ".jxl": ("pillow_jxl", "jxl"), ".dng": ("rawpy", "raw")}


@pytest.mark.parametrize("suffix", SAVE)
def test_a_picture_of_another_format_is_read_like_any(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"A{suffix}"
    SAVE[suffix](path)
    path = path.rename(path.with_suffix(suffix.upper()))
    assert list_images(tmp_path) == [path]
    image = open_image(path)
    expected = picture()
    if suffix == ".dng":  # developed at half the size, and rotated
        expected = expected.resize((WIDTH // 2, HEIGHT // 2)).transpose(Image.Transpose.ROTATE_270)
    assert image.size == expected.size
    for x, y in ((1, 1), (3, 1), (1, 3), (3, 3)):
        at = image.width * x // 4, image.height * y // 4
        colours = zip(image.getpixel(at), expected.getpixel(at), strict=True)
        assert max(abs(left - right) for left, right in colours) < (90 if suffix == ".dng" else 20)
    upright = (HEIGHT, WIDTH) if suffix == ".dng" else (WIDTH, HEIGHT)
    metadata = describe(path)
    assert (metadata["width"], metadata["height"]) == upright
    assert Preprocess(32)(path).shape == (3, 32, 32)
    if suffix == ".dng":
        assert (metadata["camera"], metadata["orientation"]) == ("Maker Model X", 6)
    else:
        assert open_image(path.read_bytes()).size == expected.size


@pytest.mark.parametrize("suffix", PACKAGES)
def test_what_is_not_installed_is_named(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"a{suffix}"
    SAVE[suffix](path)
    package, extra = PACKAGES[suffix]
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("HEIF", "JXL"):
        monkeypatch.delitem(Image.OPEN, name, raising=False)
    assert list_images(tmp_path) == [path], "it is a picture, and what it lacks is told"
    with pytest.raises(
        ImageError, match=rf"needs a package that is not installed: pip install 'finelip-fast\[{extra}\]'"
    ):
        open_image(path)
    assert describe(path).keys() == {"bytes", "modified", "sha256"}


@pytest.mark.parametrize("suffix", [".heic", ".jxl"])
def test_threads_that_decode_at_once_do_not_wait_for_each_other(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each picture needs most of the memory that all may use at a time."""
    monkeypatch.setenv(_decode.VARIABLE, "8")
    SAVE[suffix](tmp_path / f"small{suffix}")
    open_image(tmp_path / f"small{suffix}").resize((600, 600)).save(tmp_path / f"a{suffix}")
    pool, together = ThreadPoolExecutor(4), Barrier(4)

    def opened(_: int) -> tuple[int, int]:
        together.wait()
        return open_image(tmp_path / f"a{suffix}").size

    sizes = [pool.submit(opened, number) for number in range(4)]
    assert [size.result(timeout=300) for size in sizes] == [(600, 600)] * 4


@pytest.mark.parametrize("suffix", [".heic", ".jxl"])
def test_their_sizes_are_known_before_anything_is_decoded(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a{suffix}"
    SAVE[suffix](path)
    monkeypatch.setattr(_decode, "_MIN_BYTES_PER_PIXEL", 1 << 19)
    with pytest.raises(ImageError, match=rf"{WIDTH} x {HEIGHT} pixels needs 3072 MiB"):
        open_image(path)


@pytest.mark.parametrize("size", [(8, 8), (256, 256), (300, 17), (1000, 400), (1920, 1080), (17, 3000)])
def test_the_size_in_a_header_of_jpeg_xl(tmp_path: Path, size: tuple[int, int]) -> None:
    pytest.importorskip("pillow_jxl")
    for options in ({}, {"lossless": True}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"}):
        Image.new("RGB", size, "red").save(tmp_path / "a.jxl", **options)
        assert _decode._jxl_size((tmp_path / "a.jxl").read_bytes()) == size


@pytest.mark.parametrize("suffix", PACKAGES)
@pytest.mark.parametrize("cut", [0, 20, 60, 200])
def test_what_is_cut_off_is_told(tmp_path: Path, suffix: str, cut: int) -> None:
    path = tmp_path / f"a{suffix}"
    SAVE[suffix](path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ImageError, match=r"cannot read|is empty"):
        open_image(path)
