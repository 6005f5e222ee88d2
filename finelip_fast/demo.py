"""The demo: draw scenes, index them, search with their descriptions, and show the results on one page."""

from __future__ import annotations

import re
import shutil
import statistics
import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from finelip_fast._arguments import whole_number
from finelip_fast._files import write_error, write_text_whole, write_whole
from finelip_fast._pages import render
from finelip_fast.collection import prepare_root
from finelip_fast.datasets import Scenes
from finelip_fast.errors import InputError
from finelip_fast.index import stored_index
from finelip_fast.index.spec import CATALOGUE
from finelip_fast.kernels import clim_scores
from finelip_fast.metrics import recall
from finelip_fast.retriever import Retriever
from finelip_fast.tokenizer import encode_batch, expected_truncation

CLIP_CONTEXT = 77
_SHOWN_HITS = 5
_SCENE = re.compile(r"test-\d{6}\.png")  # ids in a demo's index


class _Query(NamedTuple):
    """A description on the page, split into the part that CLIP reads and the rest, with the pictures that searches found."""

    start: str
    cut: str
    right: str
    searches: dict[str, list[str]]
    why: str


@dataclass(frozen=True)
class DemoReport:
    """Measurements of the demo.

    Attributes:
        scenes: Number of pictures searched; each has its own description.
        rows: Recall by setting.
        query_milliseconds: Median time of one search, including encoding.
        index_seconds: Time to read, encode and store all pictures.
        page: Path of the HTML page.
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


def run_demo(out: str | Path, *, scenes: int = 400, queries: int = 16, progress: bool = True) -> DemoReport:
    """Search drawn scenes with descriptions that the bundled model has never seen, and write ``index.html``.

    Args:
        out: Folder for the pictures, the index and the page; created if missing.
        scenes: Number of test scenes.
        queries: Number of queries on the page.
        progress: Whether to show progress bars.

    Returns:
        Recall, times and the path of the page.

    Raises:
        InputError: ``scenes`` or ``queries`` is below 1, or the folder holds an index or a page that is not a demo's.
        StoreError: The folder's index cannot be read.
        WriteError: A picture or a page cannot be written.
    """
    whole_number("scenes", scenes)
    whole_number("queries", queries)
    folder = Path(out)
    pictures, page = folder / "scenes", folder / "index.html"
    _refuse_others(folder / "index", pictures, page)
    try:
        pictures.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(pictures, error) from error
    world = list(Scenes("test", scenes, image_size=256))
    paths = [pictures / f"{scene.id}.png" for scene in world]
    for scene, path in tqdm(list(zip(world, paths, strict=True)), desc="draw", disable=not progress):
        write_whole(path, partial(scene.draw().save, format="png"))

    if (folder / "index" / CATALOGUE).exists():  # an earlier demo's, perhaps with another model
        shutil.rmtree(folder / "index", ignore_errors=True)
    retriever = Retriever(index=folder / "index")
    started = time.perf_counter()
    prepare_root(retriever.index, [pictures])
    metadata = [{"time": scene.time, "weather": scene.weather, "family": scene.family} for scene in world]
    retriever.add_images(paths, metadata=metadata, progress=progress)
    index_seconds = time.perf_counter() - started

    captions = [scene.caption for scene in world]
    engine, index = retriever.engine, retriever.index
    long = engine.embed_texts(captions).half()
    with expected_truncation():
        short = engine.embed_texts(captions, context_length=CLIP_CONTEXT).half()
    images = index.embeddings
    rows = {
        f"{length} tokens, {name}": recall(clim_scores(images, embeddings, alpha=alpha))
        for length, embeddings in ((engine.config.context_length, long), (CLIP_CONTEXT, short))
        for name, alpha in (("combined", retriever.alpha), ("global only", 1.0))
    }

    times, listed = [], []
    queries = min(queries, scenes)
    for at in range(0, queries * (scenes // queries), scenes // queries):  # spread over the families
        started = time.perf_counter()
        hits = retriever.search(captions[at], k=_SHOWN_HITS)
        times.append(1e3 * (time.perf_counter() - started))
        cut = index.search(short[at : at + 1], _SHOWN_HITS, alpha=1.0).items[0]
        why = f"why-{at:04d}.html"
        retriever.explain(paths[at], captions[at]).to_html(folder / why)
        length = _characters_within(captions[at], CLIP_CONTEXT)
        searches = {
            "whole description": [Path(hit.id).name for hit in hits],
            f"first {CLIP_CONTEXT} tokens, global only": [Path(item.id).name for item in cut],
        }
        listed.append(_Query(captions[at][:length], captions[at][length:], paths[at].name, searches, why))

    report = DemoReport(scenes, rows, statistics.median(times), index_seconds, str(page))
    metrics = list(next(iter(rows.values())))
    text = render("demo.html", report=report, metrics=metrics, queries=listed, clip_context=CLIP_CONTEXT)
    write_text_whole(page, text)
    return report


def _refuse_others(index: Path, pictures: Path, page: Path) -> None:
    """Refuse to replace an index or a page that is not a demo's."""
    if (index / CATALOGUE).exists():
        with closing(stored_index(index)) as opened:
            foreign = next((item.id for item in opened.items() if not _SCENE.fullmatch(item.id)), None)
        if foreign is not None:
            raise InputError(
                f"expected a folder for the demo alone, but {index} holds {foreign!r:.200}; give another one (--out)"
            )
    if page.exists() and not pictures.exists():
        raise InputError(f"expected a folder for the demo alone, but it holds {page}; give another one (--out)")


def _characters_within(caption: str, context_length: int) -> int:
    """Number of characters of a caption that fit into ``context_length`` tokens, up to the end of a word."""
    words = caption.split(" ")
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        fits = int(encode_batch([" ".join(words[:middle])], 100_000).lengths[0]) <= context_length
        low, high = (middle, high) if fits else (low, middle - 1)
    return len(" ".join(words[:low]))
