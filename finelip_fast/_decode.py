"""Opening and decoding of picture files within bounds.

Pillow reads some fifty formats, some of which start a program, and trusts what a header says: 34 bytes can ask for gigabytes.
So there is an allow-list of formats, the memory for decoding is computed from the header before anything is allocated, and the
threads of a process share one budget: small pictures are decoded in parallel, large ones one after another.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

from PIL import ExifTags, Image, ImageFile

from finelip_fast import _raw
from finelip_fast._files import open_without_waiting
from finelip_fast.errors import ImageError, InputError

VARIABLE = "FINELIP_PICTURE_MEMORY"
_DEFAULT_MEMORY = 1024  # MiB

# Formats that cameras, phones, editors and data sets write, the most common first.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "AVIF", "JPEG2000", "HEIF", "JXL")


class _Plugin(NamedTuple):
    """A package that adds a format to Pillow, imported when the first such file is opened."""

    module: str
    remedy: str
    suffixes: tuple[str, ...]
    signature: re.Pattern[bytes]


_PLUGINS = {
    "HEIF": _Plugin(
        "pillow_heif",
        "pip install 'finelip-fast[heic]'",
        (".heic", ".heics", ".heif", ".heifs", ".hif"),
        re.compile(rb"....ftyp(?:hei[cxms]|hev[cx]|mif1|msf1)", re.DOTALL),
    ),
    "JXL": _Plugin(
        "pillow_jxl",
        "pip install 'finelip-fast[jxl]'",
        (".jxl",),
        re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
    ),
    "AVIF": _Plugin(
        "PIL.AvifImagePlugin",
        "pip install --upgrade pillow",
        (".avif", ".avifs"),
        re.compile(rb"....ftypavi[fs]", re.DOTALL),
    ),
}

# Suffixes of file names by format.
_SUFFIXES = {name: f".{name.lower()}" for name in ("PNG", "WEBP", "GIF", "BMP", "PPM", "AVIF", "JXL")}
_SUFFIXES |= {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2", "HEIF": ".heic"}

# Measured peak bytes per pixel of decoding: the picture, and what the format's library keeps beside it. JPEG is computed
# separately, since only the resolution that is needed is decoded.
_BYTES_PER_PIXEL = {"WEBP": 17, "AVIF": 18, "JPEG2000": 24, "HEIF": 18, "JXL": 18}
_WHOLE = 8  # for all others: the picture, and a strip or its conversion to RGB

MAX_SIDE = 1 << 20  # every row takes time, however short
_MIN_BYTES_PER_PIXEL = 4  # bounds the time for formats that need few bytes
_MAX_SCANNED = 1 << 35  # pixels times scans of a progressive JPEG: each scan covers the whole picture
_MAX_INTERPRETED = 1 << 20  # pixels that Pillow decodes in Python, at about one second per million
_MAX_HEADER_READS = 1 << 15

# EXIF orientation -> operation that turns the picture upright; 1 is upright already. ImageOps.exif_transpose is not used: it
# turns the picture before it is shrunk, copies an upright one, and fails if the rest of the metadata is broken.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Tags of a TIFF's size as it is stored.
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257

# Orientations of pictures that are stored sideways.
_SIDEWAYS = range(5, 9)

Reduction = Callable[[int, int], tuple[int, int]]


def image_suffixes() -> frozenset[str]:
    """Suffixes, such as ``.jpg``, of files that can be read here or could be if a package were installed."""
    registered = (suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)
    return frozenset(
        [*registered, *(suffix for plugin in _PLUGINS.values() for suffix in plugin.suffixes), *_raw.SUFFIXES]
    )


def memory_limit() -> int:
    """Memory limit of one picture in bytes: ``FINELIP_PICTURE_MEMORY`` in MiB, or 1 GiB; concurrent ones share twice that.

    Raises:
        InputError: The variable is not a positive integer.
    """
    text = os.environ.get(VARIABLE) or str(_DEFAULT_MEMORY)
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise InputError(f"expected {VARIABLE} to be a positive number of MiB, got {text!r:.80}; unset it to use 1024")
    return int(text) << 20


def check_size(width: int, height: int, need: float = 0.0) -> None:
    """Refuse a picture that is too large to decode.

    Args:
        need: Number of bytes it takes, if known to exceed the minimum.

    Raises:
        ImageError: The picture is too large; the message gives the limit and says how to raise it.
    """
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"expected sides of at most {MAX_SIDE} pixels, got {width} x {height}; crop or shrink it")
    least, limit = width * height * _MIN_BYTES_PER_PIXEL, memory_limit()
    need = max(need, least)
    if need > limit:
        smaller = " save it as a baseline JPEG," if least <= limit else ""
        raise ImageError(
            f"decoding {width} x {height} pixels needs {need / (1 << 20):.0f} MiB, and a picture may use {limit >> 20}; "
            f"shrink it,{smaller} or allow more MiB with --decode-memory or {VARIABLE}"
        )


class _Budget:
    """Memory that decoding may take at a time in all threads of the process; first come, first served."""

    def __init__(self) -> None:
        self._turn, self._freed, self._taken = threading.Lock(), threading.Condition(), 0

    @contextmanager
    def share(self, need: int) -> Iterator[None]:
        total = 2 * memory_limit()
        need = min(need, total)  # a picture that needs more gets all of it
        with self._turn, self._freed:
            self._freed.wait_for(lambda: self._taken + need <= total)
            self._taken += need
        try:
            yield
        finally:
            with self._freed:
                self._taken -= need
                self._freed.notify_all()


_budget = _Budget()


def _renew_budget() -> None:
    global _budget
    _budget = _Budget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_budget)  # a thread of the parent may hold the lock, or memory


class _Quiet:
    """Suppresses Pillow's warnings about odd files, shown or raised, while any thread decodes.

    ``warnings.catch_warnings`` in one thread undoes what another does meanwhile, so one filter is added and removed here.
    """

    _FILTER: Any = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

    def __init__(self) -> None:
        self._lock, self._threads = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._threads += 1
            if self._FILTER not in warnings.filters:  # even if another catch_warnings has removed it
                warnings.filterwarnings("ignore", module=r"PIL\.")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._threads -= 1
            if not self._threads:
                with suppress(ValueError):
                    warnings.filters.remove(self._FILTER)  # type: ignore[attr-defined]


quiet = _Quiet()


class _Header:
    """A file whose header must take a bounded number of reads, and whose pixels may take any number."""

    reads_left: float = _MAX_HEADER_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise ImageError("the header is in too many pieces")
        return super().read(size)  # type: ignore[misc,no-any-return]


class _PictureFile(_Header, io.BufferedReader):
    pass


class _PictureBytes(_Header, io.BytesIO):
    pass


@contextmanager
def decoded(source: str | bytes | bytearray | memoryview, reduction: Reduction | None) -> Iterator[Image.Image]:
    """Decode a file's first picture as it is stored, with its memory reserved inside the ``with`` block.

    Args:
        source: Path of a regular file, or its content.
        reduction: Function from width and height to the factors by which a large picture may be shrunk; None: no shrinking.

    Raises:
        ImageError: The format is not supported, or the picture is too large. Whatever Pillow raises is passed on.
    """
    if isinstance(source, str) and _raw.is_raw(source):
        with _raw.developed(source, _budget.share) as image:
            yield image
        return
    with _opened(source) as file, _identified(file) as image:
        file.reads_left = float("inf")
        with within_budget(image, file, reduction):
            image.load()
            yield image


@contextmanager
def header(source: str | bytes) -> Iterator[tuple[tuple[int, int], Image.Exif]]:
    """Read width, height and EXIF of a file's first picture as it is stored; pixels are not decoded.

    The EXIF is empty if it is broken, which is no reason to lose a sound picture.

    Args:
        source: Path of a regular file, or its content.

    Raises:
        ImageError: The format is not supported, or the picture is too large. Whatever Pillow raises is passed on.
    """
    if isinstance(source, str) and _raw.is_raw(source):
        yield _raw.header(source)
        return
    with _opened(source) as file, _identified(file) as image:
        tags = image.tag_v2 if image.format == "TIFF" else {}  # type: ignore[attr-defined]
        # Pillow gives the size of a TIFF after turning it upright.
        yield (tags.get(_TIFF_WIDTH, image.width), tags.get(_TIFF_HEIGHT, image.height)), _exif(image)


def suffix_of(content: bytes) -> str:
    """Return the file name suffix for an encoded picture, such as ``.jpg``; its format is detected from the content.

    Raises:
        ImageError: The format is not supported, or the picture is too large. Whatever Pillow raises is passed on.
    """
    with quiet, _opened(content) as file, _identified(file) as image:
        return _SUFFIXES[str(image.format)]


def _opened(source: str | bytes | bytearray | memoryview) -> Any:
    if isinstance(source, str):
        return _PictureFile(io.FileIO(source, opener=open_without_waiting), 1 << 16)
    return _PictureBytes(source)


@contextmanager
def within_budget(image: Image.Image, file: Any = None, reduction: Reduction | None = None) -> Iterator[None]:
    """Reserve memory for an image that is yet to be loaded.

    Raises:
        ImageError: The image is too large, or its format or its variant of the format is not supported.
    """
    width, height = image.size
    check_size(width, height)
    # Plugins have no tiles.
    pending = isinstance(image, ImageFile.ImageFile) and (
        bool(image.tile) or (file is not None and image.format in _PLUGINS)
    )
    if pending and image.format not in FORMATS:
        raise _not_read(str(image.format))
    across, down = reduction(width, height) if reduction else (1, 1)
    pixels = width * height
    need = pixels * (_file_bytes_per_pixel(image, file, min(across, down)) if pending else 0.0)
    need += pixels * 4 / (across * down) * ((image.mode != "RGB") + (orientation(image) in UPRIGHT))
    if pending:
        need += _tile_bytes(image)
        check_size(width, height, need)
        _refuse_slow(image)
    # A file in JPEG XL has its share already: a thread that waited for another would keep it from everyone.
    with nullcontext() if file is not None and image.format == "JXL" else _budget.share(int(need)):
        yield


@contextmanager
def _identified(file: Any) -> Iterator[ImageFile.ImageFile]:
    """Open a file by the first format that accepts it.

    ``Image.open`` also warns beyond a limit of its own, which photographs exceed; otherwise it does what this loop does.
    """
    Image.init()
    prefix = file.read(16)
    _import_plugin(prefix)
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is None or not _accepts(accept, prefix):
            continue
        claimed = turned = 0
        for width, height in _claims(name, file):
            claimed = max(claimed, width * height * _BYTES_PER_PIXEL.get(name, 0))
            check_size(width, height, claimed)
            turned = max(turned, width * height * 2 * 4)
        file.seek(0)
        # The JPEG XL plugin decodes on opening: all that the picture needs is reserved now, with its conversion and turning.
        with _budget.share(claimed + turned) if name == "JXL" else nullcontext():
            try:
                image = factory(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue  # not of this format after all
            with image:
                yield image
        return
    for name, (_, accept) in Image.OPEN.items():
        if name not in FORMATS and accept and _accepts(accept, prefix):
            raise _not_read(name)
    raise ImageError("not an image, or in a format that this Pillow does not support")


def _import_plugin(prefix: bytes) -> None:
    """Import the plugin for a file that begins with ``prefix``, if there is one.

    Raises:
        ImageError: The package is not installed.
    """
    for name, plugin in _PLUGINS.items():
        if name not in Image.OPEN and plugin.signature.match(prefix):
            try:
                module = importlib.import_module(plugin.module)
            except ImportError:
                raise ImageError(f"{name} needs a package that is not installed: {plugin.remedy}") from None
            if name == "HEIF":
                module.register_heif_opener()


def _accepts(accept: Any, prefix: bytes) -> bool:
    answer = accept is None or accept(prefix)
    return bool(answer) and not isinstance(answer, str)  # a string names what is not installed


def _not_read(name: str) -> ImageError:
    return ImageError(f"expected one of the formats {', '.join(FORMATS)}, got {name}; convert it")


def _claims(name: str, file: Any) -> list[tuple[int, int]]:
    """Sizes stated in a file whose format's library relies on them before Pillow reports one, or on others than Pillow."""
    if name not in ("WEBP", "AVIF", "JPEG2000", "HEIF", "JXL"):
        return []
    file.seek(0)
    content = file.read()
    if name == "JXL":
        return [_jxl_size(content)]
    if name in ("AVIF", "HEIF"):
        return [struct.unpack(">II", match[1]) for match in re.finditer(rb"ispe.{4}(.{8})", content, re.DOTALL)]
    if name == "JPEG2000":
        sizes = (
            struct.unpack(">IIII", match[1])
            for match in re.finditer(rb"\xff\x4f\xff\x51.{4}(.{16})", content, re.DOTALL)
        )
        return [(right - left, bottom - top) for right, bottom, left, top in sizes]
    kind, head = content[12:16], content[20:30]
    if len(head) < 10:
        return []
    if kind == b"VP8X":
        return [(1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little"))]
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return [((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)]
    return [(int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF)]


def _jxl_size(content: bytes) -> tuple[int, int]:
    """Width and height in the header of a JPEG XL codestream (ISO/IEC 18181-1, C.2).

    Raises:
        ImageError: There is no codestream.
    """
    start = content.find(b"\xff\x0a") if content[:2] == b"\xff\x0a" else content.find(b"\xff\x0a", content.find(b"jxl"))
    bits, at = int.from_bytes(content[start + 2 : start + 14], "little"), 0
    if start < 0:
        raise ImageError("the JPEG XL file has no codestream")

    def take(count: int) -> int:
        nonlocal at
        at += count
        return bits >> (at - count) & ((1 << count) - 1)

    is_small = take(1)

    def side() -> int:
        return (take(5) + 1) * 8 if is_small else take((9, 13, 18, 30)[take(2)]) + 1

    height, ratio = side(), take(3)
    numerator, denominator = ((1, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio]
    return (side() if ratio == 0 else height * numerator // denominator), height


def _file_bytes_per_pixel(image: Any, file: Any, reduction: int) -> float:
    if image.format not in ("JPEG", "MPO"):
        return float(_BYTES_PER_PIXEL.get(image.format, _WHOLE))
    buffered = _coefficient_bytes(image, file)
    if not file:
        return 4 + buffered
    scale = next((scale for scale in (8, 4, 2) if scale <= reduction), 1)
    if buffered:
        file.seek(0)
        scans = file.read().count(b"\xff\xda")
        if scans * image.width * image.height > _MAX_SCANNED:
            raise ImageError(f"the progressive JPEG has {scans} scans; save it as a baseline JPEG")
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    return 4 / scale**2 + buffered


def _coefficient_bytes(image: Any, file: Any) -> float:
    """Bytes per pixel of the coefficients that libjpeg keeps for the whole picture if it is stored in several scans."""
    if file and image.format == "JPEG" and not image.info.get("progressive"):
        # Pillow has read up to the end of the first scan's header.
        length = 6 + 2 * image.layers
        end = file.tell()
        file.seek(max(end - length - 2, 0))
        if file.read(5) == b"\xff\xda" + struct.pack(">HB", length, image.layers):
            return 0.0  # all components in one scan
    areas = [across * down for _, across, down, _ in image.layer]
    widest = max((across for _, across, _, _ in image.layer), default=1)
    tallest = max((down for _, _, down, _ in image.layer), default=1)
    return float(2 * sum(areas) / max(widest * tallest, 1))


def orientation(image: Image.Image) -> Any:
    """The orientation of a picture in its EXIF, None if there is none."""
    return _exif(image).get(ExifTags.Base.Orientation)


def _exif(image: Image.Image) -> Image.Exif:
    """EXIF of a picture, which is not decoded for it; empty if it is broken."""
    try:
        if image.format != "PNG":
            return image.getexif()
        # Pillow decodes a PNG to find EXIF behind its pixels.
        if "exif" not in image.info and (late := _late_exif(getattr(image, "fp", None))):
            image.info["exif"] = late
        return Image.Image.getexif(image)
    except Exception:  # broken metadata is no reason to lose a sound picture
        return Image.Exif()


def _late_exif(file: Any) -> bytes | None:
    """EXIF of a PNG file that is anywhere in it, None if there is none; the place in the file is kept."""
    if file is None:  # the picture is decoded, and its EXIF was read
        return None
    place = file.tell()
    try:
        file.seek(8)  # behind the signature
        for _ in range(_MAX_HEADER_READS):
            head = file.read(8)
            if len(head) < 8:
                break
            length = int.from_bytes(head[:4], "big")
            if head[4:] == b"eXIf":
                content: bytes = file.read(length)
                return content
            file.seek(length + 4, os.SEEK_CUR)
        return None
    finally:
        file.seek(place)


def upright_size(size: tuple[int, int], orientation: Any) -> tuple[int, int]:
    """Width and height of a picture once it is turned upright, from those as stored and its orientation in EXIF."""
    return (size[1], size[0]) if orientation in _SIDEWAYS else size


@contextmanager
def blaming(name: str) -> Iterator[None]:
    """Turn whatever goes wrong while decoding into an ImageError that names the picture."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"cannot read {name}: {error}") from error
    except MemoryError as error:
        raise ImageError(f"cannot read {name}: there is not enough memory to decode it") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error and more
        raise ImageError(f"cannot read {name}: {str(error) or type(error).__name__}") from error


def _tile_bytes(image: Any) -> int:
    """Bytes of one tile of a TIFF, which may be larger than the picture."""
    sides = [image.tag_v2.get(tag, 0) for tag in (322, 323)] if image.format == "TIFF" else [0]
    return 16 * sides[0] * sides[-1] if all(isinstance(side, int) for side in sides) else 0


def _refuse_slow(image: Any) -> None:
    codecs = {tile[0] for tile in image.tile}
    if "ppm_plain" in codecs:
        raise ImageError("expected a binary PPM, got a plain-text PPM; convert it")
    if image.width * image.height > _MAX_INTERPRETED and codecs & set(Image.DECODERS):
        raise ImageError(
            f"{image.width} x {image.height} pixels of a rare kind of {image.format} that takes minutes to decode; "
            "convert it to PNG"
        )
