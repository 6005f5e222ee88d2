"""Study of how much of a caption a generator draws, in a world where both are known: ``finelip study drawing``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from finelip_fast.checkpoint import load
from finelip_fast.checkpoint.building import CLIP_CONTEXT
from finelip_fast.datasets.scenes import FAMILY_SIZE, Scene, Scenes
from finelip_fast.errors import InputError
from finelip_fast.kernels import clim_scores
from finelip_fast.metrics import pair_ranks
from finelip_fast.model import FineLIP
from finelip_fast.records import Record, Table
from finelip_fast.tokenizer import token_spans, tokenize
from finelip_fast.training.generator import Generator, as_pixels

_BATCH = 16  # pictures drawn at once
_EARLIER, _LATER = f"described within {CLIP_CONTEXT} tokens (%)", "described later (%)"
_RECALL = "recall@1, text to image (%)"


@dataclass(frozen=True)
class DrawingSetting:
    """Settings of the study: what is drawn, and which model judges.

    Attributes:
        generators: Folders of runs of :mod:`finelip_fast.training.generator`.
        scenes: Number of scenes of the test split whose captions are drawn; whole families.
        judge: Checkpoint that ranks the pictures for the captions; None: the bundled one.
        steps, guidance_scale, seed: Arguments of :meth:`finelip_fast.training.generator.Generator.draw`.
        progress: Whether to show a progress bar.
    """

    generators: tuple[str, ...]
    scenes: int = 400
    judge: str | None = None
    steps: int = 30
    guidance_scale: float = 3.0
    seed: int = 0
    progress: bool = True


class Detail(NamedTuple):
    """A difference between a scene and another of its family: its place in the picture, and the token that mentions it."""

    scene: int
    sibling: int
    box: tuple[float, float, float, float]
    token: int


def drawing(setting: DrawingSetting) -> Record:
    """Draw captions, and check for each detail whether the picture is closer to the right scene or to its sibling.

    Scenes of a family differ in one or two details. In the area of the detail, a picture is compared, by mean squared
    difference, with the renderer's own pictures of the described scene and of its sibling: chance is 50 %.

    Raises:
        InputError: The scenes do not form whole families.
        ConfigError: A folder holds no generator.
    """
    if setting.scenes % FAMILY_SIZE or not setting.scenes:
        raise InputError(
            f"expected scenes to be a multiple of {FAMILY_SIZE}, the size of a family, got {setting.scenes}"
        )
    scenes = list(Scenes("test", setting.scenes))
    details = [detail for at in range(len(scenes)) for detail in _details(scenes, at)]
    judge = load(setting.judge)
    drawn = {folder: _drawn(Generator.load(folder), scenes, setting) for folder in setting.generators}
    for size in sorted({pictures.shape[-1] for pictures in drawn.values()}):
        drawn[f"the renderer, at {size} pixels"] = as_pixels(scenes, size)
    rows = [{"drawn by": name, **_measures(pictures, scenes, details, judge)} for name, pictures in drawn.items()]
    about = {
        "scenes": setting.scenes,
        "steps": setting.steps,
        "guidance_scale": setting.guidance_scale,
        "seed": setting.seed,
    }
    shares = [f"{row[_LATER]:.1f} % by {row['drawn by']}" for row in rows]
    ranked = [f"{row[_RECALL]:.1f} % by {row['drawn by']}" for row in rows]
    finding = (
        f"Details described after token {CLIP_CONTEXT} that are drawn: {', '.join(shares)}; chance is 50 %. Pictures that are "
        f"found by their description at rank 1: {', '.join(ranked)}."
    )
    return Record("drawing", "How much of a description is drawn", (Table("Details drawn", rows),), (), about, finding)


def _details(scenes: Sequence[Scene], at: int) -> Iterator[Detail]:
    """Yield the differences between a scene and the others of its family that the scene's caption mentions."""
    first = at - at % FAMILY_SIZE
    scene = scenes[at]
    for sibling in range(first, first + FAMILY_SIZE):
        for placed, changed in zip(scene.objects, scenes[sibling].objects, strict=True):
            differing = [name for name, value in vars(placed).items() if vars(changed)[name] != value]
            places = [place for name in differing if (place := _described_at(scene, placed, name)) is not None]
            if places:
                boxes = zip(placed.box, changed.box, strict=True)
                box = tuple(edge(pair) for edge, pair in zip((min, min, max, max), boxes, strict=True))
                ((token, _),) = token_spans(scene.caption, [(min(places), min(places))])
                yield Detail(at, sibling, box, token)  # type: ignore[arg-type]


def _described_at(scene: Scene, placed: object, name: str) -> int | None:
    """Character position at which a caption mentions a detail, or None if it does not."""
    value = vars(placed)[name]
    for part in scene.parts:
        if part.object is placed and isinstance(value, str) and value in part.text:
            return part.start + part.text.index(value)
    return None


def _drawn(generator: Generator, scenes: Sequence[Scene], setting: DrawingSetting) -> Tensor:
    batches = [scenes[start : start + _BATCH] for start in range(0, len(scenes), _BATCH)]
    pictures = []
    for number, batch in enumerate(tqdm(batches, unit="batch", disable=not setting.progress)):
        captions = [scene.caption for scene in batch]
        pictures.append(
            generator.draw(
                captions, seed=setting.seed + number, steps=setting.steps, guidance_scale=setting.guidance_scale
            )
        )
    return torch.cat(pictures)


def _measures(pictures: Tensor, scenes: list[Scene], details: list[Detail], judge: FineLIP) -> dict[str, float]:
    """Shares of the details drawn, and how well the judge finds the pictures by their captions, in %."""
    truth = as_pixels(scenes, pictures.shape[-1])
    right: dict[bool, list[bool]] = defaultdict(list)
    for detail in details:
        images = pictures[detail.scene], truth[detail.scene], truth[detail.sibling]
        drawn, true, false = (_crop(image, detail.box) for image in images)
        is_right = bool((drawn - true).square().mean() < (drawn - false).square().mean())
        right[detail.token >= CLIP_CONTEXT - 1].append(is_right)
    ranks = _ranks(pictures, [scene.caption for scene in scenes], judge)
    return {
        _EARLIER: 100 * sum(right[False]) / max(1, len(right[False])),
        _LATER: 100 * sum(right[True]) / max(1, len(right[True])),
        "details": len(details),
        _RECALL: 100 * float((ranks <= 1).double().mean()),
    }


def _crop(image: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    size = image.shape[-1]
    x0, y0 = (min(size - 1, max(0, int(edge * size))) for edge in box[:2])
    x1, y1 = (max(low + 1, min(size, round(edge * size))) for low, edge in zip((x0, y0), box[2:], strict=True))
    return image[:, y0:y1, x0:x1]


@torch.inference_mode()
def _ranks(pictures: Tensor, captions: Sequence[str], judge: FineLIP) -> Tensor:
    """Rank of each caption's picture among all pictures."""
    drawn = [to_pil_image(picture) for picture in pictures]
    batches = [drawn[start : start + _BATCH] for start in range(0, len(drawn), _BATCH)]
    images = torch.cat([judge.encode_image(judge.preprocess.batch(batch)) for batch in batches])
    texts = judge.encode_text(tokenize(captions, judge.config.context_length, tokenizer=judge.tokenizer))
    _, ranks = pair_ranks(clim_scores(images, texts, alpha=judge.alpha), torch.arange(len(captions)))
    return ranks
