"""Camera RAW, by LibRaw: the picture that the camera made of it, or one developed here."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from PIL import ExifTags, Image

from finelip_fast.errors import ImageError

# Of files that LibRaw reads. Those of many cameras are TIFFs, of which Pillow would read a thumbnail.
SUFFIXES = (
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc", ".mef", ".mos", ".mrw"),
    *(".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"),
)

# The camera's picture is taken where it has a side of so many pixels: as much as any model looks at.
_LEAST_SIDE = 1024
# Peak bytes a pixel of developing at half the size, measured.
_BYTES_PER_PIXEL = 10
# What LibRaw calls turns, as EXIF's orientation.
_ORIENTATIONS = {3: 3, 5: 8, 6: 6}


def is_raw(path: str) -> bool:
    """Whether a file is camera RAW, by its name."""
    return os.path.splitext(path)[1].lower() in SUFFIXES


@contextmanager
def developed(path: str, share: Callable[[int], Any]) -> Iterator[Image.Image]:
    """The picture of a RAW file, with the orientation in its EXIF.

    Args:
        path: The file.
        share: Context manager that sets so many bytes of memory aside.

    Raises:
        ImageError: rawpy is not installed, or LibRaw cannot read the file.
    """
    with _opened(path) as raw:
        sizes = raw.sizes
        with share(sizes.raw_width * sizes.raw_height * _BYTES_PER_PIXEL):
            yield _preview(raw, sizes.flip) or _half_size(raw)


def header(path: str) -> tuple[tuple[int, int], Image.Exif]:
    """Width and height as the sensor lies, and the EXIF of a RAW file that is a TIFF.

    Raises:
        ImageError: rawpy is not installed, or LibRaw cannot read the file.
    """
    with _opened(path) as raw:
        size = raw.sizes.width, raw.sizes.height
    exif = Image.Exif()
    with suppress(SyntaxError, OSError), open(path, "rb") as file:
        exif.load_from_fp(file)
        for part in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            exif.get_ifd(part)  # now, while the file is open
    return size, exif


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    try:
        import rawpy
    except ImportError:
        raise ImageError("camera RAW needs a package that is not installed: pip install 'finelip-fast[raw]'") from None
    with rawpy.RawPy() as raw:
        try:
            raw.open_file(path)
            yield raw
        except rawpy.LibRawError as error:
            raise ImageError(f"LibRaw cannot read it: {error}") from None


def _preview(raw: Any, flip: int) -> Image.Image | None:
    import rawpy

    try:
        thumbnail = raw.extract_thumb()
    except (rawpy.LibRawNoThumbnailError, rawpy.LibRawUnsupportedThumbnailError):
        return None
    if thumbnail.format != rawpy.ThumbFormat.JPEG:
        return None
    image: Image.Image = Image.open(io.BytesIO(thumbnail.data), formats=["JPEG"])
    if max(image.size) < _LEAST_SIDE:
        return None
    image.load()
    exif = image.getexif()
    exif.setdefault(ExifTags.Base.Orientation, _ORIENTATIONS.get(flip, 1))
    return image


def _half_size(raw: Any) -> Image.Image:
    return Image.fromarray(raw.postprocess(half_size=True, use_camera_wb=True))  # upright already
