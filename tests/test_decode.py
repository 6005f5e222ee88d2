"""Limits on picture files: what is refused before it costs anything, and what decoding may use."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile

from finelip_fast import _decode
from finelip_fast._decode import header, upright_size
from finelip_fast.errors import ImageError, InputError
from finelip_fast.preprocess import Preprocess, open_image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, colour_type: int = 2, depth: int = 8, *, rows: int = 0) -> bytes:
    """Return a PNG of any size with a few rows of zeros, which is cheap to create."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    channels = {0: 1, 2: 3, 6: 4}[colour_type]
    packer = zlib.compressobj(1)
    row = bytes(1 + (width * channels * depth + 7) // 8)
    content = b"".join(packer.compress(row) for _ in range(rows)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def webp(kind: bytes, width: int, height: int) -> bytes:
    """Return 34 bytes whose header declares a picture."""
    if kind == b"VP8X":
        content = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == b"VP8L":
        content = b"\x2f" + ((width - 1) | (height - 1) << 14).to_bytes(4, "little") + bytes(9)
    else:
        content = b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(4)
    content = kind + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", 4 + len(content)) + b"WEBP" + content


def lying(kind: str, mark: bytes, skip: int, *sizes: tuple[int, int], **options: object) -> bytes:
    """Return a small file in which the size after ``mark`` is false."""
    content = bytearray(encoded(Image.new("RGB", (16, 16)), kind, **options))
    at = content.index(mark) + len(mark) + skip
    for size in sizes:
        content[at : at + 8] = struct.pack(">II", *size)
        at += 16
    return bytes(content)


def scans(count: int) -> bytes:
    """Return a progressive JPEG of a large empty picture whose second scan is repeated."""
    content = encoded(Image.new("L", (64, 64)), "JPEG", progressive=True)
    frame, second = content.index(b"\xff\xc2"), content.index(b"\xff\xda", content.index(b"\xff\xda") + 2)
    content = content[: frame + 5] + struct.pack(">HH", 15000, 15000) + content[frame + 9 :]
    return content[:second] + content[second : second + 10] * count + b"\xff\xd9"


def tiff_tiles(side: int) -> bytes:
    """Return a TIFF of 16 x 16 pixels with tiles of another size."""
    content = encoded(Image.new("RGB", (16, 16)), "TIFF", compression="tiff_lzw")
    entries, offset = struct.unpack_from("<I", content, 4)[0], []
    tags = [content[at : at + 12] for at in range(entries + 2, entries + 2 + 12 * content[entries], 12)]
    rename = {273: 324, 279: 325}  # strips to tiles
    for tag in tags:
        number = struct.unpack_from("<H", tag)[0]
        if number != 278:
            offset.append(struct.pack("<H", rename.get(number, number)) + tag[2:])
    offset += [struct.pack("<HHII", tag, 4, 1, side) for tag in (322, 323)]
    offset.sort(key=lambda tag: struct.unpack_from("<H", tag))
    return (
        content[:4]
        + struct.pack("<I", len(content))
        + content[8:]
        + struct.pack("<H", len(offset))
        + b"".join(offset)
        + bytes(4)
    )


TOO_LARGE: dict[str, tuple[Callable[[], bytes], str]] = {
    "png of a strip": (lambda: png(1, 178_000_000), "sides of at most 1048576 pixels, got 1 x 178000000"),
    "wide png": (lambda: png(178_000_000, 1, 0, 1), "sides of at most 1048576 pixels, got 178000000 x 1"),
    "png of 178 megapixels": (
        lambda: png(13400, 13300),
        "needs 1360 MiB, and a picture may use 1024.*FINELIP_PICTURE",
    ),
    "png of one bit": (lambda: png(13400, 13300, 0, 1), "13400 x 13300 pixels needs"),
    "png with alpha": (lambda: png(13400, 13300, 6), "13400 x 13300 pixels needs"),
    "webp, extended": (lambda: webp(b"VP8X", 16384, 16384), "16384 x 16384 pixels needs"),
    "webp, widest": (lambda: webp(b"VP8X", 1 << 24, 255), "sides of at most"),
    "webp, lossless": (lambda: webp(b"VP8L", 16384, 16384), "16384 x 16384 pixels needs"),
    "webp, lossy": (lambda: webp(b"VP8 ", 16383, 16383), "16383 x 16383 pixels needs"),
    "avif": (lambda: lying("AVIF", b"ispe", 4, (16000, 16000)), "16000 x 16000 pixels needs"),
    "jpeg 2000": (
        lambda: lying("JPEG2000", b"\xff\x4f\xff\x51", 4, (30000, 30000), (30000, 30000)),
        "30000 x 30000 pixels needs",
    ),
    "gif": (
        lambda: b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + bytes(9) + b"\2\0;",
        "65535 x 65535",
    ),
    "bmp": (
        lambda: b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0),
        "60000 x 60000",
    ),
    "ppm": (lambda: b"P6 60000 60000 255\n", "60000 x 60000 pixels needs"),
    "scans of a jpeg": (lambda: scans(400), "progressive JPEG has 40. scans"),
    "tile of a tiff": (lambda: tiff_tiles(1 << 16), "16 x 16 pixels needs 65536 MiB"),
}


@pytest.mark.parametrize(("make", "reason"), TOO_LARGE.values(), ids=TOO_LARGE.keys())
def test_what_would_take_too_much_is_refused_by_its_header(tmp_path: Path, make: Callable, reason: str) -> None:
    path = tmp_path / "large"
    path.write_bytes(make())
    for source in (path, make()):
        for decode in (open_image, Preprocess()):
            with pytest.raises(ImageError, match=reason):
                decode(source)


def test_the_limit_is_raised_by_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = encoded(Image.new("RGB", (1000, 1000)), "PNG")
    monkeypatch.setenv("FINELIP_PICTURE_MEMORY", "7")
    with pytest.raises(ImageError, match="needs 8 MiB, and a picture may use 7;"):
        open_image(picture)
    monkeypatch.setenv("FINELIP_PICTURE_MEMORY", "8")
    assert open_image(picture).size == (1000, 1000)


@pytest.mark.parametrize("value", ["0", "-1", "1e9", "much", "١", "9" * 40])
def test_the_limit_is_a_positive_number(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FINELIP_PICTURE_MEMORY", value)
    with pytest.raises(InputError, match="expected FINELIP_PICTURE_MEMORY to be a positive number of MiB"):
        open_image(np.zeros((2, 2), np.uint8))


ARRAYS = {
    "array": np.broadcast_to(np.uint8(0), (60000, 60000)),
    "array of floats": np.broadcast_to(np.float64(0), (60000, 60000, 3)),
    "long array": np.broadcast_to(np.uint8(0), (1, 1 << 21)),
    "tensor": torch.zeros(1, 1, 1).expand(3, 60000, 60000),
}


@pytest.mark.parametrize("source", ARRAYS.values(), ids=ARRAYS.keys())
def test_large_arrays_are_refused(source: object) -> None:
    with pytest.raises(ImageError, match=r"60000 x 60000 pixels needs|sides of at most"):
        Preprocess()(source)


UNUSUAL = {
    "sparse tensor": torch.zeros(3, 4, 4, dtype=torch.uint8).to_sparse(),
    "tensor without values": torch.empty(3, 4, 4, device="meta"),
    "complex tensor": torch.zeros(3, 4, 4, dtype=torch.complex64),
    "dates": np.zeros((4, 4), "datetime64[s]"),
    "records": np.zeros((4, 4), [("a", "u1")]),
    "bytes": np.full((4, 4), b"a"),
    "void": np.zeros((4, 4), "V3"),
}


@pytest.mark.parametrize("source", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_unusual_arrays_are_refused(source: object) -> None:
    with pytest.raises(ImageError, match=r"(array|tensor) of shape"):
        open_image(source)


# Formats -----------------------------------------------------------------------------------------------------------

NOT_READ = ("BLP", "DDS", "EPS", "ICNS", "ICO", "MSP", "PCX", "PDF", "QOI", "SGI", "SPIDER", "TGA", "XBM", "PALM")


@pytest.mark.parametrize("kind", NOT_READ)
def test_other_formats_are_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    modes = {"MSP": "1", "XBM": "1", "SPIDER": "F", "BLP": "P", "PALM": "P"}
    path = tmp_path / "picture"
    path.write_bytes(encoded(Image.new(modes.get(kind, "RGB"), (64, 64)), kind))
    with pytest.raises(
        ImageError, match=r"expected one of the formats JPEG, PNG, .*, got [A-Z]+; convert it|not an image"
    ):
        open_image(path)


def test_an_unread_picture_of_another_format_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "figure.eps")
    with Image.open(tmp_path / "figure.eps") as image, pytest.raises(ImageError, match="got EPS; convert it"):
        open_image(image)


@pytest.mark.parametrize("content", [b"P1 2 2\n0 1 0 1", b"P2 2 2 255\n1 2 3 4", b"P3 1 1 255\n1 2 3"])
def test_plain_text_pictures_are_refused(content: bytes) -> None:
    with pytest.raises(ImageError, match="expected a binary PPM, got a plain-text PPM"):
        open_image(content)


def test_what_is_decoded_in_python_is_bounded() -> None:
    assert open_image(b"P5 2 1 100\n\x00\x64").getpixel((1, 0)) == (255, 255, 255)
    with pytest.raises(ImageError, match="1025 x 1024 pixels of a rare kind of PPM"):
        open_image(b"P5 1025 1024 100\n" + bytes(1025 * 1024))


PNG_CHUNK = b"\0\0\0\0abCd" + struct.pack(">I", zlib.crc32(b"abCd"))
PIECES = {
    "jpeg": b"\xff\xd8" + b"\xff" * 100_000,
    "png": png(1, 1)[:33] + PNG_CHUNK * 40_000,
    "gif": b"GIF89a\1\0\1\0\0\0\0" + b"!\xfe\1a\0" * 40_000,
}


@pytest.mark.parametrize("head", PIECES.values(), ids=PIECES.keys())
def test_a_header_in_countless_pieces_is_refused(head: bytes) -> None:
    with pytest.raises(ImageError, match="the header is in too many pieces"):
        open_image(head)


def test_a_pipe_in_a_files_place_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(os.path, "isfile", lambda _: True)
    monkeypatch.setattr(os.path, "getsize", lambda _: 1)
    with pytest.raises(ImageError, match=r"cannot read .*pipe"):
        open_image(tmp_path / "pipe")


def with_late_exif(content: bytes) -> bytes:
    """Return a PNG whose EXIF is moved behind its pixels."""
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    return content[:start] + content[end:-12] + content[start:end] + content[-12:]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "late PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_a_header_says_the_size_of_the_opened_picture(kind: str, turn: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    content = encoded(Image.new("RGB", (48, 40)), kind.removeprefix("late "), exif=exif)
    if kind.startswith("late"):
        content = with_late_exif(content)
    with header(content) as (size, exif):
        assert upright_size(size, exif.get(ExifTags.Base.Orientation)) == open_image(content).size
        assert size == (48, 40)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_loses_no_header(kind: str) -> None:
    content = encoded(Image.new("RGB", (48, 40)), kind, exif=b"Exif\0\0garbage")
    with header(content) as (size, exif):
        assert (size, dict(exif)) == ((48, 40), {})
    assert open_image(content).size == (48, 40)


def test_a_header_is_read_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PNG of a few kilobytes may have a billion pixels."""
    content = encoded(Image.new("L", (4000, 4000)), "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    with header(content) as (size, _):
        assert size == (4000, 4000)


def test_pillows_warnings_neither_show_nor_kill() -> None:
    odd = encoded(
        Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\3\0\xff\xff\xff\xff\x09\0\0\0"
    )
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(open_image, [odd] * 64))
    assert not caught
    assert list(warnings.filters) == before


# Memory ------------------------------------------------------------------------------------------------------------


def test_a_lack_of_memory_is_the_pictures_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def scarce(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", scarce)
    with pytest.raises(ImageError, match=r"cannot read \d+ bytes: there is not enough memory to decode it"):
        open_image(encoded(Image.new("RGB", (8, 8)), "PNG"))


def test_large_pictures_wait_for_each_other_and_small_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINELIP_PICTURE_MEMORY", "1")
    budget, lock = _decode._Budget(), threading.Lock()
    current, most = [0, 0], [0, 0]

    def take(need: int) -> None:
        kind = int(need > 1000)
        with budget.share(need):
            with lock:
                current[kind] += 1
                most[kind] = max(most[kind], current[kind])
            time.sleep(0.005)
            with lock:
                current[kind] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take, [1000] * 40 + [3 << 20] * 10 + [1000] * 40))
    assert most[0] > 1
    assert most[1] == 1
    assert budget._taken == 0


def test_a_picture_that_fails_gives_its_memory_back() -> None:
    broken = encoded(Image.effect_noise((300, 300), 50), "PNG")[:9000]
    for _ in range(3):
        with pytest.raises(ImageError):
            open_image(broken)
    assert _decode._budget._taken == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_does_not_wait_for_the_parents_threads() -> None:
    with _decode._budget.share(1 << 60):
        child = os.fork()
        if not child:
            open_image(encoded(Image.new("RGB", (8, 8)), "PNG"))
            os._exit(0)
        for _ in range(1000):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                break
            time.sleep(0.01)
        else:
            os.kill(child, 9)
            pytest.fail("the child waits")
    assert status == 0


PEAK = """
import resource, sys
from PIL import Image
from finelip_fast.preprocess import Preprocess
Image.init()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
Preprocess()(Image.new("RGB", (300, 300)))
before = peak()
pixels = Preprocess()(sys.argv[1])
assert pixels.shape == (3, 224, 224) and bool(pixels.isfinite().all())
print((peak() - before) >> 10)
"""


def peak(path: Path) -> int:
    """Return the MiB that a picture takes in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-I", "-c", PEAK, str(path)], capture_output=True, text=True, timeout=300, check=True
    )
    return int(run.stdout)


# The most pixels that are accepted, in pictures that are fast to create and decode.
LIMITS = {
    "png": (lambda: png(11500, 11500, 2, rows=11500), 600),
    "png with alpha": (lambda: png(11500, 11500, 6, rows=11500), 600),
    "png of one bit": (lambda: png(11500, 11500, 0, 1, rows=11500), 250),
    "png just below shrinking": (lambda: png(8192, 8192, 6, rows=8192), 700),
    "jpeg": (lambda: blank_jpeg(16384), 50),
}


def blank_jpeg(side: int) -> bytes:
    """Return a grey JPEG with truncated data, which Pillow accepts because of its end marker."""
    content = encoded(Image.new("L", (side, 1024)), "JPEG")
    frame = content.index(b"\xff\xc0")
    return content[: frame + 5] + struct.pack(">HH", side, side) + content[frame + 9 :]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures peak memory as Linux tells it")
@pytest.mark.parametrize(("make", "most"), LIMITS.values(), ids=LIMITS.keys())
def test_a_picture_at_the_limit_takes_less_than_a_gibibyte(tmp_path: Path, make: Callable, most: int) -> None:
    path = tmp_path / "large"
    path.write_bytes(make())
    assert peak(path) < most


def test_a_photograph_of_200_megapixels_is_shrunk_while_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.meshgrid(np.linspace(0, 9, 900), np.linspace(0, 7, 700))
    photograph = Image.fromarray(((np.stack([np.sin(x), np.sin(y), np.cos(x * y / 9)], -1) + 1) * 127).astype(np.uint8))
    files = [encoded(photograph, kind) for kind in ("JPEG", "PNG", "TIFF")]
    for transform in (Preprocess(32), Preprocess(16, resize_mode="squash")):
        exact = transform(photograph)
        with monkeypatch.context() as patch:
            patch.setattr("finelip_fast.preprocess._EXACT_PIXELS", 1 << 16)
            for source in (photograph, np.asarray(photograph), *files):
                assert (transform(source) - exact).abs().max() < 0.1
    assert photograph.size == (900, 700)


# Damage --------------------------------------------------------------------------------------------------------------

SEVERAL = {"save_all": True, "append_images": [Image.new("RGB", (24, 16), "red")]}

# Small files of every format and kind that Pillow can write here.
KINDS: list[tuple[str, str, dict[str, object]]] = [
    *[("JPEG", mode, {}) for mode in ("L", "RGB", "CMYK")],
    *[("JPEG", "RGB", {"progressive": True}), ("JPEG", "RGB", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0", "subsampling": 0})],
    *[("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")],
    *[("WEBP", mode, options) for mode in ("RGB", "RGBA") for options in ({}, {"lossless": True})],
    *[("TIFF", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr")],
    *[("TIFF", "RGB", {"compression": f"tiff_{name}"}) for name in ("lzw", "adobe_deflate")],
    *[("TIFF", "RGB", {"compression": name}) for name in ("jpeg", "packbits", "zstd", "lzma", "webp")],
    *[("TIFF", "1", {"compression": name}) for name in ("group3", "group4", "tiff_ccitt")],
    *[("TIFF", "RGB", {"big_tiff": True})],
    *[("GIF", mode, {}) for mode in ("L", "P", "RGB")],
    *[(kind, "RGB", SEVERAL) for kind in ("GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF")],
    *[("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")],
    *[("PPM", mode, {}) for mode in ("1", "L", "RGB", "I;16", "F")],
    *[("AVIF", mode, {}) for mode in ("RGB", "RGBA")],
    *[("JPEG2000", mode, {}) for mode in ("L", "LA", "RGB", "RGBA", "I;16")],
    *[("JPEG2000", "RGB", options) for options in ({"no_jp2": True}, {"tile_size": (8, 8)})],
    *[(kind, "RGB", {}) for kind in ("DDS", "EPS", "ICNS", "ICO", "IM", "PCX", "PDF", "QOI", "SGI", "TGA")],
]  # fmt: skip


@cache
def sound() -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    files = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, mode, options in KINDS:
            if mode == "I;16":
                image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
            elif mode == "F":
                image = Image.fromarray(noise[..., 0].astype(np.float32) / 255)
            else:
                image = Image.fromarray(noise).convert(mode)
            try:
                files.append(encoded(image, kind, **options))
            except (KeyError, OSError, RuntimeError, ValueError):  # the library for it is missing
                continue
    return files


LARGE = [struct.pack(order + size, value) for order in "<>" for size in "HIQ" for value in (0, 1, 255, 4096, 65535)]
LARGE += [
    struct.pack(order + "I", value) for order in "<>" for value in (40_000, 1 << 20, 1 << 24, 1 << 31, (1 << 32) - 1)
]


def damaged(seed: int) -> bytes:
    """Return a small picture with bytes changed, cut, doubled or replaced by another number, mostly in its header."""
    chance = random.Random(seed)
    content = bytearray(chance.choice(sound()))
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        end = len(content) if chance.random() < 0.4 else min(len(content), 200)
        at = chance.randrange(max(end, 1))
        match chance.randrange(7):
            case 0:
                content[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                content[at : at + 1] = bytes([(content or b"\0")[at] ^ 1 << chance.randrange(8)])
            case 2:
                del content[at:]
            case 3:
                del content[at : at + chance.randrange(1, 32)]
            case 4:
                content[at:at] = content[at : at + chance.randrange(1, 256)]
            case 5:
                number = chance.choice(LARGE)
                content[at : at + len(number)] = number
            case 6:
                second_picture = chance.choice(sound())
                content[at:] = second_picture[chance.randrange(len(second_picture)) :]
        content = content or bytearray(b"\0")
    if content.startswith(b"\x89PNG") and chance.random() < 0.8:  # valid checksums let more damage through
        at = 8
        while at + 12 <= len(content):
            length = struct.unpack_from(">I", content, at)[0]
            if at + 12 + length > len(content):
                break
            content[at + 8 + length : at + 12 + length] = struct.pack(
                ">I", zlib.crc32(content[at + 4 : at + 8 + length])
            )
            at += 12 + length
    return bytes(content)


@settings(settings.get_profile("fuzz"))
@given(seed=st.integers(0, 2**48))
def test_damaged_pictures_are_read_or_refused(seed: int) -> None:
    try:
        pixels = Preprocess(8)(damaged(seed))
    except ImageError:
        return
    assert pixels.shape == (3, 8, 8)
    assert pixels.isfinite().all()


def test_what_is_damaged_is_read_when_it_is_sound() -> None:
    refused = []
    for content in sound():
        try:
            Preprocess(8)(content)
        except ImageError as error:
            refused.append(str(error))
    assert len(sound()) - len(refused) > 50
    assert all("convert it" in reason or "not an image" in reason for reason in refused)
