"""Camera RAW, read by LibRaw: the picture that the camera embedded, or one developed here."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from PIL import ExifTags, Image

from finelip_fast.errors import ImageError

# Suffixes of files that LibRaw reads. The files of many cameras are TIFFs, of which Pillow would read only a thumbnail.
SUFFIXES = (
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc", ".mef", ".mos", ".mrw"),
    *(".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"),
)

# The camera's picture is used if its longer side has at least this many pixels: as many as any model looks at.
_LEAST_SIDE = 1024
# Measured peak bytes per pixel of developing at half size.
_BYTES_PER_PIXEL = 10
# LibRaw's flips as EXIF orientations.
_ORIENTATIONS = {3: 3, 5: 8, 6: 6}


def is_raw(path: str) -> bool:
    """Return whether a file is camera RAW, judged by its name."""
    return os.path.splitext(path)[1].lower() in SUFFIXES


@contextmanager
def developed(path: str, share: Callable[[int], Any]) -> Iterator[Image.Image]:
    """Open the picture of a RAW file, with the orientation in its EXIF.

    Args:
        path: Path of the file.
        share: Function from a number of bytes to a context manager that reserves this memory.

    Raises:
        ImageError: rawpy is not installed, or LibRaw cannot read the file.
    """
    with _opened(path) as raw:
        sizes = raw.sizes
        with share(sizes.raw_width * sizes.raw_height * _BYTES_PER_PIXEL):
            yield _preview(raw, sizes.flip) or _half_size(raw)


def header(path: str) -> tuple[tuple[int, int], Image.Exif]:
    """Read width and height in the sensor's orientation, and the EXIF if the RAW file is a TIFF.

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
