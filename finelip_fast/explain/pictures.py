"""Explanations to look at: a picture of one phrase's map, and a page with all maps.

Maps are shown by lightness alone, bright where a phrase is found and dark elsewhere, so that they read the same in greyscale
and for every kind of colour vision; words are marked by shade and by the thickness of their underline.
"""

from __future__ import annotations

import base64
import io
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from finelip_fast._files import write_text_whole
from finelip_fast._pages import render
from finelip_fast._terminal import printable
from finelip_fast.errors import InputError
from finelip_fast.preprocess import ImageSource, open_image

if TYPE_CHECKING:
    from finelip_fast.explain.explanation import Explanation

MAPS = ("raw", "aggregated")  # kinds of maps of what a token found in each place

_SIDE = 1024  # largest side in pixels of the picture on the page: phones show three pixels per CSS pixel


def overlay(explanation: Explanation, phrase: str | tuple[int, int], *, tokens: str) -> Any:
    """Draw the picture, and beside it the same picture lit where the phrase is found.

    Raises:
        InputError: Unknown words, an unknown map, or no matplotlib.
    """
    heat = explanation.heatmap(phrase, tokens=tokens)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("overlays need matplotlib: pip install 'finelip-fast[plots]'") from None
    picture = explanation.pixels.permute(1, 2, 0)
    light = torch.nn.functional.interpolate(_light(heat)[None, None], size=picture.shape[:2], mode="bilinear")[0, 0]
    figure = Figure(figsize=(8, 4.4), layout="constrained", dpi=120)
    axes = figure.subplots(1, 2)
    for axis, layer in zip(axes, (picture, picture * (0.15 + 0.85 * light[..., None])), strict=True):
        axis.imshow(layer.numpy())
        axis.set_axis_off()
    axes[1].contour(light.numpy(), levels=[0.5, 0.8], colors="white", linewidths=[1, 2])
    words = phrase if isinstance(phrase, str) else explanation.caption[slice(*phrase)]
    words = printable(" ".join(words.split()))
    figure.suptitle(words if len(words) < 80 else words[:77] + "…", parse_math=False, fontsize=10)
    return figure


def page(explanation: Explanation, path: str | PathLike[str] | None) -> str:
    """Return the page as text, and write it to ``path`` if given."""
    pieces, end = [], 0
    for word in explanation.words:
        before, adds = explanation.caption[end : word.start], explanation.added_by(word)
        pieces.append({"before": before, "text": word.text, "name": word.bare, "adds": adds})
        end = word.end
    text = render(
        "explanation.html",
        explanation=explanation,
        pieces=pieces,
        beyond=explanation.caption[end:],
        whole=explanation.peak(len(explanation.contributions) - 1, len(explanation.contributions)),
        added_by_words=float(explanation.contributions[1:-1, 1:].sum()),
        explained=explained(explanation),
        picture=_data_uri(explanation.picture),
    )
    if path is not None:
        write_text_whole(Path(path), text)
    return text


def explained(explanation: Explanation) -> dict[str, Any]:
    """Return what ``explanation.js`` shows: ``side``, ``squashed``, and ``maps`` by kind."""
    maps = {kind: _tables(explanation, kind) for kind in explanation.maps}
    return {"side": explanation.side, "squashed": explanation.squashed, "maps": maps}


def bounded(source: ImageSource) -> Image.Image:
    """Open a picture, shrunk to at most 1024 pixels in width and height."""
    picture = open_image(source)
    picture.thumbnail((_SIDE, _SIDE))
    return picture


def _tables(explanation: Explanation, kind: str) -> dict[str, list[str]]:
    """Return each word's patches and each patch's words, two hexadecimal digits each."""
    maps = torch.zeros(len(explanation.words), explanation.side**2)
    for row, word in zip(maps, explanation.words, strict=True):
        row.copy_(explanation.map_of_tokens(word.first, word.last, tokens=kind))
    # Values below zero are evidence against a word, not for it.
    return {
        "maps": [_bytes(_light(row)) for row in maps],
        "words": [_bytes(_levels(row.clamp(min=0))) for row in maps.T],
    }


def _light(values: Tensor) -> Tensor:
    """Scale a map to [0, 1], with the lower half of its values dark, so that a single low value does not wash out the rest."""
    return _levels((values - values.median()).clamp(min=0)) if values.numel() else values


def _levels(values: Tensor) -> Tensor:
    """Scale values to [0, 1], from the lowest to the highest."""
    if not values.numel():
        return values
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp(min=1e-12)


def _bytes(levels: Tensor) -> str:
    return (levels * 255).round().to(torch.uint8).numpy().tobytes().hex()


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
