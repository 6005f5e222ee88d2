"""Explanations to look at: a picture of one phrase's map, and a page of all of them.

Maps are shown by lightness alone, bright where a phrase is found and dark elsewhere, so that they read the same in greyscale
and for every kind of colour vision; words are marked by shade and by the thickness of their underline.
"""

from __future__ import annotations

import base64
import html
import io
import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from finelip_fast._errors import InputError

if TYPE_CHECKING:
    from finelip_fast.explain.explanation import Explanation

_SHOWN = 384  # pixels of the picture's side on the page


def overlay(explanation: Explanation, phrase: str, *, tokens: str) -> Any:
    """The picture, and beside it the same picture lit where the phrase is found.

    Raises:
        InputError: No such words, no such map, or no matplotlib.
    """
    heat = explanation.heatmap(phrase, tokens=tokens)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("overlays need matplotlib: pip install 'finelip-fast[plots]'") from None
    picture = explanation.pixels.permute(1, 2, 0)
    light = torch.nn.functional.interpolate(_levels(heat)[None, None], size=picture.shape[:2], mode="bilinear")[0, 0]
    figure = Figure(figsize=(8, 4.4), layout="constrained", dpi=120)
    axes = figure.subplots(1, 2)
    for axis, shown in zip(axes, (picture, picture * (0.15 + 0.85 * light[..., None])), strict=True):
        axis.imshow(shown.numpy())
        axis.set_axis_off()
    axes[1].contour(light.numpy(), levels=[0.5, 0.8], colors="white", linewidths=[1, 2])
    figure.suptitle(phrase if len(phrase) < 80 else phrase[:77] + "…")
    return figure


def page(explanation: Explanation, path: str | PathLike[str] | None) -> str:
    """The page as text, written to ``path`` where there is one."""
    maps = torch.stack([explanation.map_of_tokens(word.first, word.last, tokens="raw") for word in explanation.words])
    added = [float(explanation.contributions[word.first : word.last].sum()) for word in explanation.words]
    data = {
        "side": explanation.side,
        # Two hexadecimal digits for each word and patch.
        "maps": [(_levels(one) * 255).round().to(torch.uint8).numpy().tobytes().hex() for one in maps],
        # For each patch its words: cosines below zero say nothing.
        "words": [(_levels(one.clamp(min=0)) * 255).round().to(torch.uint8).numpy().tobytes().hex() for one in maps.T],
    }
    parts, at = [], 0
    for number, word in enumerate(explanation.words):
        parts.append(html.escape(explanation.caption[at : word.start]))
        parts.append(
            f'<span tabindex="0" data-word="{number}" title="adds {added[number]:+.4f}">{html.escape(word.text)}</span>'
        )
        at = word.end
    parts.append(f'<s title="beyond the context">{html.escape(explanation.caption[at:])}</s>')
    whole = float(explanation.contributions[1:-1, 1:].sum())
    text = _PAGE.format(
        picture=_data_uri(explanation.pixels),
        caption="".join(parts),
        data=json.dumps(data),
        size=_SHOWN,
        score=f"{explanation.score:.4f}",
        alpha=f"{explanation.alpha:g}",
        rest=f"{1 - explanation.alpha:g}",
        global_score=f"{explanation.global_score:.4f}",
        fine_score=f"{explanation.fine_score:.4f}",
        words=f"{whole:.4f}",
        others=f"{explanation.score - whole:.4f}",
    )
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def _levels(values: Tensor) -> Tensor:
    """Values to [0, 1], the lowest to the highest."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp(min=1e-12)


def _data_uri(pixels: Tensor) -> str:
    array = (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>finelip_fast: why this picture</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.7 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
main {{ display: flex; flex-wrap: wrap; gap: 2rem; align-items: flex-start; }}
#view {{ position: relative; width: {size}px; height: {size}px; flex: none; }}
#view img, #view canvas {{ position: absolute; inset: 0; width: 100%; height: 100%; }}
p {{ flex: 1; min-width: 20rem; margin: 0; }}
span {{ cursor: pointer; }}
span:hover, span:focus {{ outline: 2px solid currentColor; outline-offset: 1px; }}
</style></head><body>
<h1>Why this picture</h1>
<p>Score {score} = {alpha} &times; global {global_score} + {rest} &times; fine {fine_score}. Words with patches add {words}
of it, what the whole picture or the whole caption takes part in adds {others}.</p>
<p>Move over a word (or reach it with the tab key) to light the parts of the picture that are most like it; move over the
picture to underline the words that are most like that part.</p>
<main><div id="view"><img src="{picture}" alt="the picture"><canvas width="{size}" height="{size}"></canvas></div>
<p>{caption}</p></main>
<script>
const data = {data}, view = document.getElementById("view"), canvas = view.querySelector("canvas");
const draw = canvas.getContext("2d"), words = [...document.querySelectorAll("span[data-word]")];
const level = (hex, at) => parseInt(hex.substr(2 * at, 2), 16) / 255;
function clear() {{
  draw.clearRect(0, 0, canvas.width, canvas.height);
  for (const word of words) word.style.cssText = "";
}}
function light(word) {{
  clear();
  const cell = canvas.width / data.side, map = data.maps[word.dataset.word];
  for (let at = 0; at < data.side ** 2; at++) {{
    draw.fillStyle = `rgba(0, 0, 0, ${{0.85 * (1 - level(map, at))}})`;
    draw.fillRect((at % data.side) * cell, Math.floor(at / data.side) * cell, cell + 1, cell + 1);
  }}
}}
function mark(event) {{
  clear();
  const box = view.getBoundingClientRect(), place = (where, start, size) =>
    Math.min(data.side - 1, Math.max(0, Math.floor((where - start) / size * data.side)));
  const column = place(event.clientX, box.left, box.width), row = place(event.clientY, box.top, box.height);
  const found = data.words[row * data.side + column], cell = canvas.width / data.side;
  words.forEach((word, at) => {{
    const value = level(found, at);
    if (value > 0.5) word.style.cssText = `background: rgba(128, 128, 128, ${{value - 0.4}});`
      + `text-decoration: underline ${{(6 * value - 2).toFixed(1)}}px; text-decoration-skip-ink: none`;
  }});
  for (const [colour, width] of [["black", 5], ["white", 2]]) {{
    draw.strokeStyle = colour; draw.lineWidth = width;
    draw.strokeRect(column * cell, row * cell, cell, cell);
  }}
}}
for (const word of words) {{
  for (const event of ["mouseenter", "focus", "click"]) word.addEventListener(event, () => light(word));
  for (const event of ["mouseleave", "blur"]) word.addEventListener(event, clear);
}}
view.addEventListener("pointermove", mark);
view.addEventListener("pointerleave", clear);
</script></body></html>
"""
