"""The README's picture of a search: a description, and the best matches among 400 drawn scenes.

``python docs/search_picture.py`` draws ``docs/search.png`` from the bundled model and the scenes of ``make demo``.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from finelip_fast.datasets import Scenes
from finelip_fast.retriever import Retriever
from finelip_fast.tokenizer import encode_batch

PICTURE = Path(__file__).with_name("search.png")
SCENES, QUERY, SHOWN = 400, 264, 4
RIGHT, OTHER, SOFT = "#1a7f37", "white", "#6a6a6a"


def main() -> None:
    scenes = {scene.id: scene for scene in Scenes("test", SCENES, image_size=256)}
    pictures = {name: scene.draw() for name, scene in scenes.items()}
    query = scenes[f"test-{QUERY:06}"]
    retriever = Retriever(engine="torch", device="cpu")
    retriever.add_images(pictures.values(), ids=list(pictures), progress=False)
    hits = retriever.search(query.caption, k=SHOWN)

    figure = Figure(figsize=(10, 4.9), dpi=110, facecolor="white")
    tokens = int(encode_batch([query.caption], 1000).lengths[0])
    figure.text(0.02, 0.95, f"A description of {tokens} tokens", weight="bold", size=11, va="top")
    text = textwrap.fill(query.caption, 148)
    figure.text(0.02, 0.895, text, size=9.2, va="top", linespacing=1.5)
    figure.text(0.02, 0.60, f"The best of {SCENES} pictures", weight="bold", size=11, va="top")
    for rank, hit in enumerate(hits):
        axes = figure.add_axes((0.02 + 0.245 * rank, 0.09, 0.225, 0.46))
        axes.imshow(pictures[hit.id])
        axes.set(xticks=[], yticks=[])
        right = hit.id == query.id
        for spine in axes.spines.values():
            spine.set(color=RIGHT if right else OTHER, linewidth=5)
        axes.set_xlabel(
            f"{rank + 1}.  {hit.score:.3f}" + (", the right one" if right else ""),
            color=RIGHT if right else SOFT,
            size=10,
        )
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
