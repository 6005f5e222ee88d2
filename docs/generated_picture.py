"""The picture of docs/how-to/generate.md: scenes as the renderer draws them, and as generators draw their descriptions.

``python docs/generated_picture.py RUN_OF_77 RUN_OF_256`` draws ``docs/generated.png`` from two runs of
:mod:`finelip_fast.training.generator`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

from finelip_fast.datasets import Scenes
from finelip_fast.training.generator import Generator, as_pixels

PICTURE = Path(__file__).with_name("generated.png")
SCENES = 6


def main(folders: list[str]) -> None:
    scenes = list(Scenes("test", 4 * SCENES))[::4]  # one of each family
    captions = [scene.caption for scene in scenes]
    generators = [Generator.load(folder) for folder in folders]
    rows = {"described": as_pixels(scenes, 64)}
    for generator in generators:
        rows[f"from {generator.condition.context_length} tokens"] = generator.draw(captions)
    figure = Figure(figsize=(1.7 * SCENES, 1.75 * len(rows)), dpi=100, facecolor="white", layout="tight")
    pictures = (picture for row in rows.values() for picture in row)
    for axes, picture in zip(figure.subplots(len(rows), SCENES).flat, pictures, strict=True):
        axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
    for axes, name in zip(figure.axes[::SCENES], rows, strict=True):
        axes.set_ylabel(name, size=11)
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main(sys.argv[1:])
