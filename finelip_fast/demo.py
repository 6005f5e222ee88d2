"""The demo: draw scenes, index them, search their descriptions, and show it all on one page."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

from finelip_fast._files import write_error, write_whole
from finelip_fast._markup import in_html
from finelip_fast.datasets import Scenes
from finelip_fast.errors import InputError
from finelip_fast.index.store import CATALOGUE
from finelip_fast.kernels import clim_scores
from finelip_fast.metrics import recall
from finelip_fast.retriever import Retriever
from finelip_fast.tokenizer import encode_batch, expected_truncation

CLIP_CONTEXT = 77
_SHOWN_HITS = 5


@dataclass(frozen=True)
class DemoReport:
    """What the demo measured.

    Attributes:
        scenes: Pictures searched; each has a description of its own.
        rows: Recall by setting.
        query_milliseconds: Median time of one search, encoding included.
        index_seconds: Time to read, encode and store all pictures.
        page: The HTML page.
    """

    scenes: int
    rows: dict[str, dict[str, float]]
    query_milliseconds: float
    index_seconds: float
    page: str

    def __str__(self) -> str:
        names = list(next(iter(self.rows.values())))
        heads = [name.replace("i2t_recall", "image>text R").replace("t2i_recall", "text>image R") for name in names]
        lines = [f"{'':34}" + "  ".join(f"{head:>15}" for head in heads)]
        for setting, metrics in self.rows.items():
            lines.append(f"{setting:34}" + "  ".join(f"{metrics[name]:15.3f}" for name in names))
        lines += [
            "",
            f"{self.scenes} pictures indexed in {self.index_seconds:.1f} s, {self.query_milliseconds:.1f} ms a query (median)",
            f"the page: {self.page}",
        ]
        return "\n".join(lines)


def run_demo(folder: str | Path, *, scenes: int = 400, shown: int = 16, progress: bool = True) -> DemoReport:
    """Search drawn scenes with descriptions that the bundled model never saw, and write ``index.html``.

    Args:
        folder: Where pictures, index and page go; made if missing.
        scenes: How many test scenes.
        shown: How many queries the page shows.
        progress: Show progress bars.

    Returns:
        Recall, times and the page's path.

    Raises:
        InputError: Fewer than one scene, or one query.
        WriteError: A picture or a page that cannot be written.
    """
    if scenes < 1 or shown < 1:
        raise InputError(f"expected at least one scene and one query, got {scenes} and {shown}")
    folder = Path(folder)
    pictures = folder / "scenes"
    try:
        pictures.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(pictures, error) from error
    world = list(Scenes("test", scenes, image_size=256))
    paths = [pictures / f"{scene.id}.png" for scene in world]
    for scene, path in tqdm(list(zip(world, paths, strict=True)), desc="draw", disable=not progress):
        write_whole(path, partial(scene.draw().save, format="png"))

    if (folder / "index" / CATALOGUE).exists():  # of an earlier demo, perhaps with another model
        shutil.rmtree(folder / "index", ignore_errors=True)
    retriever = Retriever(index=folder / "index")
    started = time.perf_counter()
    retriever.add_images(paths, progress=progress)
    index_seconds = time.perf_counter() - started

    captions = [scene.caption for scene in world]
    engine, index = retriever.engine, retriever.index
    long = engine.embed_texts(captions).half()
    with expected_truncation():
        short = engine.embed_texts(captions, context_length=CLIP_CONTEXT).half()
    images = index.embeddings
    rows = {
        f"{engine.config.context_length} tokens, global + fine": recall(
            clim_scores(images, long, alpha=retriever.alpha)
        ),
        f"{engine.config.context_length} tokens, global only": recall(clim_scores(images, long, alpha=1.0)),
        f"{CLIP_CONTEXT} tokens, global + fine": recall(clim_scores(images, short, alpha=retriever.alpha)),
        f"{CLIP_CONTEXT} tokens, global only (as CLIP)": recall(clim_scores(images, short, alpha=1.0)),
    }

    times, results = [], []
    for at in range(min(shown, scenes)):
        at = at * (scenes // min(shown, scenes))  # spread over the families
        started = time.perf_counter()
        hits = retriever.search(captions[at], k=_SHOWN_HITS)
        times.append(1e3 * (time.perf_counter() - started))
        cut = index.search(short[at : at + 1], _SHOWN_HITS, alpha=1.0).items[0]
        why = f"why-{at:04d}.html"
        retriever.explain(paths[at], captions[at]).to_html(folder / why)
        results.append(
            (
                why,
                captions[at],
                paths[at].name,
                [Path(hit.id).name for hit in hits],
                [Path(item.id).name for item in cut],
            )
        )

    page = folder / "index.html"
    report = DemoReport(scenes, rows, statistics.median(times), index_seconds, str(page))
    text = _page(report, results)
    write_whole(page, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return report


def _seen(caption: str, context: int) -> int:
    """Characters of a caption that fit into ``context`` tokens, to the end of a word."""
    words = caption.split(" ")
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        fits = int(encode_batch([" ".join(words[:middle])], 100_000).lengths[0]) <= context
        low, high = (middle, high) if fits else (low, middle - 1)
    return len(" ".join(words[:low]))


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --soft: #8a8a8a; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
td:first-child, th:first-child { text-align: left; }
section { border-top: 1px solid var(--line); margin-top: 2rem; padding-top: 1rem; }
.cut { color: var(--soft); text-decoration: underline dotted; text-underline-offset: .2em; }
.row { display: grid; grid-template-columns: 9rem repeat(5, 1fr); gap: .6rem; align-items: center; margin: .6rem 0; }
figure { margin: 0; text-align: center; font-size: .8rem; color: var(--soft); }
img { width: 100%; border-radius: .5rem; display: block; }
.own img { outline: 4px solid var(--good); }
.own { color: var(--good); font-weight: 600; }
"""


def _page(report: DemoReport, results: Sequence[tuple[str, str, str, list[str], list[str]]]) -> str:
    names = list(next(iter(report.rows.values())))
    head = "".join(f"<th>{name.replace('_recall@', ' R@')}</th>" for name in names)
    body = "".join(
        f"<tr><td>{in_html(setting)}</td>" + "".join(f"<td>{metrics[name]:.3f}</td>" for name in names) + "</tr>"
        for setting, metrics in report.rows.items()
    )
    sections = "".join(_section(number, *result) for number, result in enumerate(results, start=1))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>finelip_fast: long descriptions find pictures</title><style>{_STYLE}</style></head><body>
<h1>Long descriptions find the right pictures</h1>
<p>{report.scenes} drawn street scenes, in families of four that differ in one or two details. The bundled model never saw
them. {report.query_milliseconds:.1f} ms a query (median). i2t: a picture looks for its description; t2i: a description looks
for its picture.</p>
<table><tr><th></th>{head}</tr>{body}</table>
<p>In each description, <span class="cut">dotted words</span> lie beyond the {CLIP_CONTEXT} tokens that CLIP reads.
A green frame marks the right picture.</p>
{sections}</body></html>
"""


def _section(number: int, why: str, caption: str, own: str, found: list[str], cut: list[str]) -> str:
    split = _seen(caption, CLIP_CONTEXT)
    text = f'{in_html(caption[:split])}<span class="cut">{in_html(caption[split:])}</span>'
    rows = ""
    for label, names in (("whole description", found), (f"first {CLIP_CONTEXT} tokens, global only", cut)):
        figures = "".join(_figure(name, rank, own) for rank, name in enumerate(names, start=1))
        rows += f'<div class="row"><strong>{label}</strong>{figures}</div>'
    link = f'<a href="{why}">Why the right picture is right</a>'
    return f"<section><p><strong>{number}.</strong> {text} {link}</p>{rows}</section>\n"


def _figure(name: str, rank: int, own: str) -> str:
    mark, label = (' class="own"', f"{rank}: right") if name == own else ("", str(rank))
    return f'<figure{mark}><img src="scenes/{quote(name)}" alt="hit {rank}: {in_html(name)}" loading="lazy">{label}</figure>'
