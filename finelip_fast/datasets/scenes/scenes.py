"""Generated street scenes with long descriptions: a small, exact world for fine-grained retrieval.

Four consecutive scenes form a family: variants of one base scene, each with one or two details redrawn (a
door, a coat, the weather). Telling them apart takes the whole description, because its statements are shuffled and
the deciding detail may be in any of them.

    scenes = Scenes("test")
    scene = scenes[0]
    scene.caption          # "The house on the left is ..."
    scene.draw()           # a PIL image, 224 x 224
    scene.parts[0].box     # where in the picture the first phrase is true

Everything is determined by ``(seed, split, index)``; nothing is stored and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from finelip_fast._arguments import one_of, whole_number
from finelip_fast.datasets.scenes import drawing, words
from finelip_fast.datasets.scenes.content import (
    FAMILY_SIZE,
    Content,
    Placed,
    family,
)
from finelip_fast.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

SPLITS = {"train": 64_000, "train_mixed": 64_000, "val": 1_000, "test": 1_000, "very_long": 200}
MAX_SIZE = 10_000_000  # scenes, which take a day to draw
MAX_IMAGE_SIZE = 4096
_DETAILED_EVERY = 4  # every fourth family of "train_mixed" is described in detail
VARIANTS = words.VARIANTS


class Phrase(NamedTuple):
    """A span of a clean caption that describes one placed object: ``caption[start:end] == text``."""

    text: str
    start: int
    end: int
    box: tuple[float, float, float, float]
    object: Placed


@dataclass(frozen=True)
class Scene:
    """One picture and its description, both made on demand.

    Attributes:
        id: split and index, as in ``"test-000123"``.
        family: index of its family; scenes in one family differ in only a few details.
        content: time of day, weather and placed objects.
    """

    id: str
    family: int
    content: Content
    image_size: int = field(repr=False)
    variant: str = field(repr=False)
    detailed: bool = field(repr=False)
    telling: str = field(repr=False)  # seeds the choice of words
    scenery: str = field(repr=False)  # seeds details that no description mentions: clouds, lit windows, paving

    @property
    def time(self) -> str:
        """Time of day: morning, noon, sunset or night."""
        return self.content.time

    @property
    def weather(self) -> str:
        """Weather: clear, cloudy, rain, snow or fog."""
        return self.content.weather

    @property
    def objects(self) -> tuple[Placed, ...]:
        """The placed objects: houses from left to right, then vehicles, people, trees and street furniture."""
        return self.content.objects

    @cached_property
    def _statements(self) -> list[words.Statement]:
        return words.tell(self.content, Random(self.telling), detailed=self.detailed)

    @cached_property
    def caption(self) -> str:
        """The description, in the dataset's variant."""
        return words.vary(self._statements, self.variant, Random(f"{self.telling}/{self.variant}"))

    @cached_property
    def parts(self) -> tuple[Phrase, ...]:
        """Every phrase of the clean caption that describes a placed object, in reading order."""
        return tuple(
            Phrase(text, start, start + len(text), placed.box, placed)
            for text, start, placed in words.locate(self._statements)
        )

    def draw(self, size: int | None = None) -> Image.Image:
        """Draw the scene.

        Args:
            size: side of the picture in pixels. Default: the dataset's ``image_size``.

        Returns:
            An RGB image, ``size x size``.

        Raises:
            InputError: ``size`` is below 16 or above 4096.
        """
        size = self.image_size if size is None else size
        size = _checked_image_size(size)
        return drawing.draw(self.content, size, self.scenery)


# --- The dataset -------------------------------------------------------------------------------------------------


class Scenes:
    """A map-style dataset of generated scenes.

    Args:
        split: "train", "val", "test", "very_long" (descriptions of more than 300 tokens), or "train_mixed" (every fourth
            family of scenes described as in "very_long", the others as in "train").
        size: number of scenes. Default: 64,000 for training, 1,000 for "val" and "test", 200 for "very_long". A larger size
            only adds scenes.
        image_size: default side, in pixels, of the pictures that ``Scene.draw`` makes.
        seed: random seed; each seed gives a different world.
        variant: treatment of the captions: "clean", "typos", "plain" (lower case, no punctuation), "dropped"
            (a quarter of the statements left out), "repeated" (some statements repeated) or "reordered".

    Raises:
        InputError: An unknown split or variant, or a size or image size out of range.
    """

    def __init__(
        self,
        split: str = "train",
        size: int | None = None,
        *,
        image_size: int = 224,
        seed: int = 0,
        variant: str = "clean",
    ) -> None:
        one_of("split", split, tuple(SPLITS))
        one_of("variant", variant, VARIANTS)
        image_size = _checked_image_size(image_size)
        size = SPLITS[split] if size is None else whole_number("size", size, least=None)
        if not 0 <= size <= MAX_SIZE:
            raise InputError(
                f"expected size from 0 to {MAX_SIZE}, got {f'{size}'[:40]}; leave it out for the split's own size"
            )
        self.split, self.size, self.image_size, self.seed, self.variant = split, size, image_size, seed, variant

    def __repr__(self) -> str:
        return (
            f"Scenes({self.split!r}, {self.size}, image_size={self.image_size}, seed={self.seed}, "
            f"variant={self.variant!r})"
        )

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Scene]:
        return (self[index] for index in range(self.size))

    def __getitem__(self, index: int) -> Scene:
        """Return the scene at ``index``; negative indices count from the end.

        Raises:
            InputError: ``index`` is not a whole number, such as a slice.
            IndexError: It is past either end.
        """
        index = whole_number("index", index, least=None)
        if not -self.size <= index < self.size:
            raise IndexError(f"expected an index in [{-self.size}, {self.size}), got {index}")
        index %= self.size
        number, member = divmod(index, FAMILY_SIZE)
        key = f"scenes/{self.seed}/{self.split}/{number}"
        return Scene(
            id=f"{self.split}-{index:06d}",
            family=number,
            content=family(key)[member],
            image_size=self.image_size,
            variant=self.variant,
            detailed=self.split == "very_long" or (self.split == "train_mixed" and number % _DETAILED_EVERY == 0),
            telling=f"{key}/{member}",
            scenery=key,
        )


def _checked_image_size(size: int) -> int:
    size = whole_number("image_size", size, least=None)
    if not 16 <= size <= MAX_IMAGE_SIZE:
        raise InputError(
            f"expected an image size from 16 to {MAX_IMAGE_SIZE} pixels, got {size}; 128 and more show every detail"
        )
    return size
