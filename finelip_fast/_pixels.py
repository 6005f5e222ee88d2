"""Pixels of any kind as eight bits of red, green and blue."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from finelip_fast.errors import ImageError

# Floats slightly outside [0, 1] come from resampling and rounding; more than this means another scale.
_FLOAT_SLACK = 1e-2


def is_deep(mode: str) -> bool:
    """Return whether a PIL image of this mode has more than eight bits per value."""
    return mode in ("I", "F") or mode.startswith("I;")


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB: deep grey is scaled, and transparency is blended over white."""
    if is_deep(image.mode):
        values = np.asarray(image)
        if image.mode == "I" and values.min() >= 0 and values.max() <= 65535:
            values = values.astype(np.uint16)  # how Pillow holds some 16-bit files
        image = Image.fromarray(eight_bits(values, f"mode {image.mode}"))
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    straight = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode))
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, straight.convert("RGBA")).convert("RGB")


def eight_bits(array: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Convert a picture's values to uint8; the scale depends on the dtype alone and is never guessed from the values."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "f":
        low, high = array.min(), array.max()
        # Written so that NaN fails too.
        if not (low >= -_FLOAT_SLACK and high <= 1 + _FLOAT_SLACK):
            if np.isnan(low):
                raise ImageError(f"expected float values in [0, 1], got NaN in {name}")
            remedy = "divide them by their maximum, or convert them to uint8"
            raise ImageError(f"expected float values in [0, 1], got {low:.6g} to {high:.6g} in {name}; {remedy}")
        return np.round(array.clip(0, 1) * 255).astype(np.uint8)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # in either byte order
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    raise ImageError(
        f"expected uint8, uint16, bool or float values, got {array.dtype} in {name}; convert them to uint8"
    )
