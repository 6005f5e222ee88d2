"""Explanations to look at: a picture of one phrase's map, and a page of all of them.

Maps are shown by lightness alone, bright where a phrase is found and dark elsewhere, so that they read the same in greyscale
and for every kind of colour vision; words are marked by shade and by the thickness of their underline.
"""

from __future__ import annotations

import base64
import io
import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from finelip_fast._files import write_whole
from finelip_fast._markup import in_html
from finelip_fast._terminal import printable
from finelip_fast.errors import InputError

if TYPE_CHECKING:
    from finelip_fast.explain.explanation import Explanation, Match

MAPS = ("raw", "aggregated")  # of what a token found in each place

_SHOWN = 384  # pixels of the picture's side on the page


def overlay(explanation: Explanation, phrase: str | tuple[int, int], *, tokens: str) -> Any:
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
    light = torch.nn.functional.interpolate(_light(heat)[None, None], size=picture.shape[:2], mode="bilinear")[0, 0]
    figure = Figure(figsize=(8, 4.4), layout="constrained", dpi=120)
    axes = figure.subplots(1, 2)
    for axis, shown in zip(axes, (picture, picture * (0.15 + 0.85 * light[..., None])), strict=True):
        axis.imshow(shown.numpy())
        axis.set_axis_off()
    axes[1].contour(light.numpy(), levels=[0.5, 0.8], colors="white", linewidths=[1, 2])
    said = phrase if isinstance(phrase, str) else explanation.caption[slice(*phrase)]
    said = printable(" ".join(said.split()))
    figure.suptitle(said if len(said) < 80 else said[:77] + "…", parse_math=False, fontsize=10)
    return figure


def page(explanation: Explanation, path: str | PathLike[str] | None) -> str:
    """The page as text, written to ``path`` where there is one."""
    added = [float(explanation.contributions[word.first : word.last].sum()) for word in explanation.words]
    parts, at = [], 0
    for number, (word, value) in enumerate(zip(explanation.words, added, strict=True)):
        parts.append(in_html(explanation.caption[at : word.start]))
        parts.append(
            f'<span tabindex="0" data-word="{number}" data-name="{in_html(word.bare)}" data-adds="{value:+.4f}">'
            f"{in_html(word.text)}</span>"
        )
        at = word.end
    if explanation.caption[at:].strip():
        parts.append(f'<s title="beyond the context">{in_html(explanation.caption[at:])}</s>')
    whole = float(explanation.contributions[1:-1, 1:].sum())
    text = _PAGE.format(
        picture=_data_uri(explanation.pixels),
        caption="".join(parts),
        data=json.dumps({"side": explanation.side, **{kind: _tables(explanation, kind) for kind in MAPS}}),
        matches="".join(_match(match, explanation.side) for match in explanation.matches()),
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
        write_whole(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return text


def _tables(explanation: Explanation, kind: str) -> dict[str, list[str]]:
    """For each word its patches and for each patch its words, two hexadecimal digits each."""
    maps = torch.zeros(len(explanation.words), explanation.side**2)
    for row, word in zip(maps, explanation.words, strict=True):
        row.copy_(explanation.map_of_tokens(word.first, word.last, tokens=kind))
    # What is below zero speaks against a word, not for it.
    return {
        "maps": [_bytes(_light(row)) for row in maps],
        "words": [_bytes(_levels(row.clamp(min=0))) for row in maps.T],
    }


def _match(match: Match, side: int) -> str:
    words = ", ".join(f"{in_html(word.bare)} {weight:.0%}" for word, weight in match.words) or "the end token"
    patches = ", ".join(f"row {at // side + 1} column {at % side + 1} {weight:.0%}" for at, weight in match.patches)
    cells = (f"{match.adds:+.4f}", f"{match.similarity:.3f}", words, patches or "the whole picture (CLS)")
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _light(values: Tensor) -> Tensor:
    """A map to [0, 1]: dark for the lower half of the picture, so that a single dark place does not pale the rest."""
    return _levels((values - values.median()).clamp(min=0)) if values.numel() else values


def _levels(values: Tensor) -> Tensor:
    """Values to [0, 1], the lowest to the highest."""
    if not values.numel():
        return values
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp(min=1e-12)


def _bytes(levels: Tensor) -> str:
    return (levels * 255).round().to(torch.uint8).numpy().tobytes().hex()


def _data_uri(pixels: Tensor) -> str:
    array = (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="JPEG", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>finelip_fast: why this picture</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.7 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
main {{ display: flex; flex-wrap: wrap; gap: 2rem; align-items: flex-start; }}
#view {{ position: relative; width: {size}px; height: {size}px; flex: none; }}
#view img, #view canvas {{ position: absolute; inset: 0; width: 100%; height: 100%; }}
#text {{ flex: 1; min-width: 20rem; margin: 0; }}
#told {{ min-height: 1.7em; font-weight: 600; }}
span {{ cursor: pointer; }}
span:hover, span:focus, #view:focus {{ outline: 2px solid currentColor; outline-offset: 1px; }}
label {{ margin-right: 1.5rem; }}
td, th {{ padding: .1rem .8rem .1rem 0; text-align: left; vertical-align: top; }}
</style></head><body>
<h1>Why this picture</h1>
<p>Score {score} = {alpha} &times; global {global_score} + {rest} &times; fine {fine_score}. Words with patches add {words}
of it, what the whole picture or the whole caption takes part in adds {others}.</p>
<p>Point at a word, or reach it with the tab key, to light the parts of the picture that go with it. Point at the picture, or
reach it with the tab key and move with the arrow keys, to underline the words that go with that part. The lower half
of each map is dark, and its highest value light, however near they are.</p>
<p><label><input type="radio" name="kind" value="raw" checked> most alike</label>
<label><input type="radio" name="kind" value="aggregated"> adds most to the fine score</label></p>
<p id="told" role="status"></p>
<main><div id="view" tabindex="0" role="application" aria-label="the picture's parts"><img src="{picture}" alt="the picture">
<canvas width="{size}" height="{size}"></canvas></div><p id="text">{caption}</p></main>
<h2>Matches that add most</h2>
<p>Late interaction compares mixtures of words with mixtures of patches; each is told by what most went into it.</p>
<table><tr><th>adds</th><th>cosine</th><th>words</th><th>patches</th></tr>{matches}</table>
<script>
const data = {data}, view = document.getElementById("view"), canvas = view.querySelector("canvas");
const draw = canvas.getContext("2d"), words = [...document.querySelectorAll("span[data-word]")];
const told = document.getElementById("told"), cell = canvas.width / data.side, last = data.side - 1;
const level = (hex, at) => parseInt(hex.substr(2 * at, 2), 16) / 255;
const kind = () => data[document.querySelector("input:checked").value];
const edge = (at) => Math.round(at * cell); // on whole pixels, where neighbours neither overlap nor leave a gap
const clamp = (at) => Math.min(last, Math.max(0, at));
let row = 0, column = 0;
function clear() {{
  draw.clearRect(0, 0, canvas.width, canvas.height);
  for (const word of words) word.style.cssText = "";
  told.textContent = "";
}}
function light(word) {{
  clear();
  const map = kind().maps[word.dataset.word];
  let best = 0;
  for (let at = 0; at < data.side ** 2; at++) {{
    if (level(map, at) > level(map, best)) best = at;
    draw.fillStyle = `rgba(0, 0, 0, ${{0.85 * (1 - level(map, at))}})`;
    const x = at % data.side, y = Math.floor(at / data.side);
    draw.fillRect(edge(x), edge(y), edge(x + 1) - edge(x), edge(y + 1) - edge(y));
  }}
  told.textContent = `${{word.dataset.name}}: adds ${{word.dataset.adds}}, `
    + `most at row ${{Math.floor(best / data.side) + 1}}, column ${{best % data.side + 1}}`;
}}
function mark() {{
  clear();
  const levels = words.map((_, at) => level(kind().words[row * data.side + column], at));
  words.forEach((word, at) => {{
    if (levels[at] > 0.5) word.style.cssText = `background: rgba(128, 128, 128, ${{levels[at] - 0.4}});`
      + `text-decoration: underline ${{(6 * levels[at] - 2).toFixed(1)}}px; text-decoration-skip-ink: none`;
  }});
  for (const [colour, width] of [["black", 5], ["white", 2]]) {{
    draw.strokeStyle = colour; draw.lineWidth = width;
    draw.strokeRect(column * cell, row * cell, cell, cell);
  }}
  const best = levels.map((value, at) => [value, at]).filter(([value]) => value > 0).sort((a, b) => b[0] - a[0]).slice(0, 3);
  told.textContent = `row ${{row + 1}}, column ${{column + 1}}: `
    + best.map(([value, at]) => `${{words[at].dataset.name}} ${{Math.round(100 * value)}} %`).join(", ");
}}
function point(event) {{
  const box = view.getBoundingClientRect();
  row = clamp(Math.floor((event.clientY - box.top) / box.height * data.side));
  column = clamp(Math.floor((event.clientX - box.left) / box.width * data.side));
  mark();
}}
for (const word of words) {{
  for (const event of ["mouseenter", "focus", "click"]) word.addEventListener(event, () => light(word));
  for (const event of ["mouseleave", "blur"]) word.addEventListener(event, clear);
}}
for (const event of ["pointermove", "pointerdown"]) view.addEventListener(event, point);
view.addEventListener("pointerleave", (event) => {{ if (event.pointerType === "mouse") clear(); }});
view.addEventListener("focus", mark);
view.addEventListener("blur", clear);
view.addEventListener("keydown", (event) => {{
  const move = {{ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}}[event.key];
  if (!move) return;
  event.preventDefault();
  row = clamp(row + move[0]);
  column = clamp(column + move[1]);
  mark();
}});
</script></body></html>
"""
