"""Pictures to pixels: anything that holds an image -> CLIP's normalised ``[B, 3, S, S]``.

Two steps: :func:`open_image` turns a file, bytes, a PIL image, an array or a tensor into an upright 8-bit RGB image, or
says why it cannot; :class:`Preprocess` resizes, crops and normalises it as CLIP does.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from finelip_fast._arguments import one_of, whole_number
from finelip_fast._decode import UPRIGHT, Reduction, blaming, check_size, decoded, orientation, quiet, within_budget
from finelip_fast._pixels import as_rgb, eight_bits, is_deep
from finelip_fast.config import CLIP_MEAN, CLIP_STD, FineLIPConfig
from finelip_fast.errors import ImageError, InputError

__all__ = ["ImageSource", "Preprocess", "open_image"]

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray[Any, Any] | Tensor"
)

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# A strip longer than this many times its width is cut to its middle before resizing: the crop keeps only the middle
# square, and a strip of 1 by 100,000 pixels would otherwise grow to 5 billion pixels on the way.
_MAX_ASPECT = 8

# Pictures of up to this many pixels are resized directly. Larger ones are first shrunk by an integer factor that leaves at
# least this many pixels for each one of the result, in either direction: it hardly shows, and takes a fraction of the memory.
_EXACT_PIXELS, _SPARE = 1 << 26, 3

# Pixels converted at once: a conversion takes several copies.
_STRIP_PIXELS = 1 << 22


def _colours(name: str, values: Any) -> tuple[float, float, float]:
    """Return one number each for red, green and blue; values read from JSON are a list."""
    least = " above 0" if name == "std" else ""
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"expected {name} to be 3 numbers{least}, got {values!r:.80}") from None
    if not all(math.isfinite(value) and (value > 0 or not least) for value in (red, green, blue)):
        raise InputError(f"expected {name} to be 3 numbers{least}, got {values!r:.80}")
    return red, green, blue


@dataclass(frozen=True)
class Preprocess:
    """CLIP's evaluation transform: resize, centre crop, scale to [0, 1], normalise.

    Pictures above 67 megapixels are shrunk while they are decoded, to no less than three times the target size.

    Attributes:
        image_size: Side ``S`` of the square result, in pixels.
        mean: Values subtracted from red, green and blue, on the [0, 1] scale.
        std: Values that the result is divided by, per colour.
        interpolation: ``"bicubic"`` (CLIP's) or ``"bilinear"``, antialiased.
        resize_mode: ``"shortest"`` (CLIP's) brings the shorter side to ``S`` and crops the centre; ``"squash"`` ignores
            the aspect ratio and crops nothing.

    Raises:
        InputError: A value is none of these.
    """

    image_size: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", whole_number("image_size", self.image_size))
        one_of("interpolation", self.interpolation, _FILTERS)
        one_of("resize_mode", self.resize_mode, ("shortest", "squash"))
        for name in ("mean", "std"):
            object.__setattr__(self, name, _colours(name, getattr(self, name)))

    @classmethod
    def of(cls, config: FineLIPConfig) -> Preprocess:
        """The transform that a model of this configuration was trained with."""
        return cls(config.image_size, config.image_mean, config.image_std, resize_mode=config.resize_mode)

    def __call__(self, source: ImageSource) -> Tensor:
        """Convert one picture to pixels, float32 ``[3, S, S]``.

        Raises:
            ImageError: The picture cannot be read; see :func:`open_image`.
        """
        with _upright(source, self._reduction) as upright:
            image = self._fit(upright)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return pixels.sub_(mean[:, None, None]).div_(std[:, None, None])

    def batch(self, sources: Iterable[ImageSource]) -> Tensor:
        """Convert pictures of any sizes and kinds to pixels, float32 ``[B, 3, S, S]``; no pictures give ``B = 0``.

        Raises:
            InputError: ``sources`` is a single picture.
            ImageError: A picture cannot be read; the message names it.
        """
        if isinstance(sources, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)):
            raise InputError(f"expected a list of images, got a single {type(sources).__name__}; wrap it in a list")
        images = list(sources)
        pixels = torch.empty(len(images), 3, self.image_size, self.image_size)
        for index, source in enumerate(images):
            pixels[index] = self(source)
        return pixels

    def _reduction(self, width: int, height: int) -> tuple[int, int]:
        if width * height <= _EXACT_PIXELS:
            return 1, 1
        side = _SPARE * self.image_size
        across, down = max(1, width // side), max(1, height // side)
        if self.resize_mode == "squash":
            return across, down
        return min(across, down), min(across, down)

    def _fit(self, image: Image.Image) -> Image.Image:
        size, resample = self.image_size, _FILTERS[self.interpolation]
        if self.resize_mode == "squash":
            return image.resize((size, size), resample)
        image = _without_far_ends(image)
        short = min(image.size)
        # Rounded as in torchvision, to give equal pixels: the longer side down, the crop's corner to even.
        width, height = (size if side == short else int(size * side / short) for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        return image.resize((width, height), resample).crop((left, top, left + size, top + size))


def open_image(source: ImageSource) -> Image.Image:
    """Open any picture as an upright 8-bit RGB image of its own size.

    EXIF orientation is applied, transparency is blended over white, 16-bit grey is scaled to 8 bits, and an animation gives
    its first frame. The result shares nothing with the source, and no file stays open.

    Files are JPEG, MPO, PNG, WebP, GIF, BMP, TIFF, binary PPM, AVIF or JPEG 2000; with pillow-heif, pillow-jxl-plugin or rawpy
    installed, also HEIF, JPEG XL or camera RAW (recognised by its suffix, so only as a path).
    The memory for decoding is computed from the header and must not exceed 1 GiB per picture: 268 megapixels for JPEG, half as
    many for formats that are decoded whole, fewer for WebP, AVIF and JPEG 2000. ``FINELIP_PICTURE_MEMORY`` sets another limit
    in MiB. The threads of a process together use at most twice the limit, and wait for each other beyond it.

    Args:
        source: One of

            - a path, or the bytes of an encoded file;
            - a PIL image of any mode, at its current frame;
            - an array ``[H, W]`` or ``[H, W, 1 | 3 | 4]``: uint8, uint16 in 0..65535, bool, or float in [0, 1];
            - a tensor ``[1 | 3 | 4, H, W]`` of the same types.

    Raises:
        ImageError: The picture cannot be read, or is too large; the message names the file or the array, and the reason.
        InputError: ``FINELIP_PICTURE_MEMORY`` is not a positive number.
    """
    with _upright(source) as upright:
        shared = upright is source or isinstance(upright, ImageFile.ImageFile)
        image = upright.copy() if shared else upright
    image.info = {}  # the orientation is applied: opening the result again must not turn it again
    return image


def open_thumbnail(source: ImageSource, side: int) -> Image.Image:
    """Open a picture as :func:`open_image` does, shrunk to at most ``side`` pixels in width and in height.

    A large JPEG is shrunk while it is decoded, which takes a fraction of the time and the memory.

    Raises:
        ImageError, InputError: The same as for :func:`open_image`.
    """

    def reduction(width: int, height: int) -> tuple[int, int]:
        factor = max(1, max(width, height) // (2 * side))
        return factor, factor

    with _upright(source, reduction) as upright:
        scale = min(1, side / max(upright.size))
        width, height = (max(1, round(length * scale)) for length in upright.size)
        image = upright.copy() if scale == 1 else upright.resize((width, height), Image.Resampling.BICUBIC)
    image.info = {}
    return image


def _named_file(source: object) -> tuple[str, str | bytes | bytearray | memoryview]:
    """Return the name of a path or of encoded bytes in errors, and the path or the bytes."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        size = memoryview(source).nbytes
        if not size:
            raise ImageError("expected an encoded picture; the bytes are empty")
        return f"{size} bytes", source
    if not isinstance(source, (str, os.PathLike)):
        kind = type(source).__name__
        raise ImageError(f"expected a path, encoded bytes, a PIL image, an array or a tensor, got {kind}")
    file = os.fsdecode(source)
    name = repr(file if len(file) < 500 else file[:100] + "...")
    if re.match(r"(?i)[a-z][a-z0-9+.-]+:/|data:", file):
        raise ImageError(f"expected a local file, got the URL {name}; download it first and pass its path or bytes")
    if os.path.isdir(file):
        raise ImageError(
            f"expected an image file, got the folder {name}; finelip_fast.folders.list_images({name}) lists its pictures"
        )
    if not os.path.isfile(file):  # before opening: opening a pipe would wait forever
        raise ImageError(f"no such file: {name}")
    if os.path.getsize(file) == 0:
        raise ImageError(f"expected an image file; {name} is empty")
    return name, file


@contextmanager
def _upright(source: ImageSource, reduction: Reduction | None = None) -> Iterator[Image.Image]:
    """Yield a picture as upright RGB, for reading only: it may be the source, or a file that is closed afterwards."""
    if isinstance(source, (np.ndarray, Tensor)):
        name = f"{'array' if isinstance(source, np.ndarray) else 'tensor'} of shape {tuple(source.shape)}"
        with blaming(name):
            yield _from_values(source, name, reduction)
        return
    if isinstance(source, Image.Image):
        name = f"PIL image of mode {source.mode}"
        if 0 in source.size:
            raise ImageError(f"expected a picture of at least one pixel, got {source.width} x {source.height}")
        with blaming(name), quiet, within_budget(source, None, reduction):
            source.load()
            yield _upright_rgb(source, reduction)
        return
    name, file = _named_file(source)
    with blaming(name), quiet, decoded(file, reduction) as image:
        yield _upright_rgb(image, reduction)


def _upright_rgb(image: Image.Image, reduction: Reduction | None) -> Image.Image:
    def part(top: int, bottom: int) -> Image.Image:
        return as_rgb(image if bottom - top == image.height else image.crop((0, top, image.width, bottom)))

    simple = not (is_deep(image.mode) or image.has_transparency_data)
    rgb, turn = _in_strips(image.size, part, reduction, simple=simple), UPRIGHT.get(orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


def _in_strips(
    size: tuple[int, int],
    part: Callable[[int, int], Image.Image],
    reduction: Reduction | None,
    *,
    simple: bool = False,
) -> Image.Image:
    """Build an RGB image from parts with its rows ``top .. bottom``, shrunk if ``reduction`` allows it.

    Args:
        simple: Whether a part needs no further copies, so that one part may be the whole image.
    """
    width, height = size
    across, down = reduction(width, height) if reduction else (1, 1)
    shrinks = across > 1 or down > 1
    rows = max(1, _STRIP_PIXELS // (width * down)) * down
    if not shrinks and (simple or rows >= height):
        return part(0, height)
    image = Image.new("RGB", (-(-width // across), -(-height // down)))
    for top in range(0, height, rows):
        strip = part(top, min(top + rows, height))
        image.paste(strip.reduce((across, down)) if shrinks else strip, (0, top // down))
    return image


def _layout_hint(source: np.ndarray[Any, Any] | Tensor, axis: int, move: str) -> str:
    """What to do with values of a wrong shape, if it is known; ``axis`` is where colours often lie instead."""
    if source.ndim == 4:
        return "; pass pictures one by one"
    return f"; move the colour axis {move}" if source.ndim == 3 and _has_colours(source, axis) else ""


def _from_values(source: np.ndarray[Any, Any] | Tensor, name: str, reduction: Reduction | None) -> Image.Image:
    """Convert an array or a tensor to RGB."""
    if isinstance(source, Tensor):
        if source.ndim != 3 or not _has_colours(source, 0):
            hint = _layout_hint(source, 2, "first: x.permute(2, 0, 1)")
            raise ImageError(f"expected a tensor [C, H, W] with C of 1, 3 or 4, got {name}{hint}")
        height, width = source.shape[1:]
    else:
        if source.ndim not in (2, 3) or (source.ndim == 3 and not _has_colours(source, 2)):
            hint = _layout_hint(source, 0, "last: x.transpose(1, 2, 0)")
            raise ImageError(f"expected an array [H, W] or [H, W, C] with C of 1, 3 or 4, got {name}{hint}")
        height, width = source.shape[:2]
    if not height * width:
        raise ImageError(f"expected a picture of at least one pixel, got {name}")
    check_size(width, height)

    def part(top: int, bottom: int) -> Image.Image:
        if isinstance(source, Tensor):
            rows = source[:, top:bottom].detach().cpu().permute(1, 2, 0)
            values = (rows.float() if rows.is_floating_point() else rows).numpy()
        else:
            values = source[top:bottom]
        grey = values.ndim == 3 and values.shape[2] == 1
        return as_rgb(Image.fromarray(eight_bits(values[..., 0] if grey else values, name)))

    return _in_strips((width, height), part, reduction)


def _has_colours(source: np.ndarray[Any, Any] | Tensor, axis: int) -> bool:
    return source.shape[axis] in (1, 3, 4)


def _without_far_ends(image: Image.Image) -> Image.Image:
    short, long = sorted(image.size)
    if long <= _MAX_ASPECT * short:
        return image
    keep = _MAX_ASPECT * short
    keep += (long - keep) % 2  # an even remainder keeps the middle exactly where it was
    width, height = (keep if side == long else side for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
