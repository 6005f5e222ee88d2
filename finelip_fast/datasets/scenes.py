"""Generated street scenes with long descriptions: a small, exact world for fine-grained retrieval.

Four consecutive scenes form a family: one base scene, in which each member has one or two details redrawn (a
door, a coat, the weather). Telling them apart takes the whole description, because its statements are shuffled and
the detail that decides may stand in any of them.

    scenes = Scenes("test")
    scene = scenes[0]
    scene.caption          # "The house on the left is ..."
    scene.draw()           # a PIL image, 224 x 224
    scene.parts[0].box     # where in the picture the first phrase is true

Everything follows from ``(seed, split, index)``; nothing is stored and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from finelip_fast._errors import InputError
from finelip_fast.datasets import _scene_canvas as plan
from finelip_fast.datasets import _scene_drawing as drawing
from finelip_fast.datasets import _scene_words as words

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "FAMILY_SIZE",
    "SPLITS",
    "VARIANTS",
    "Building",
    "Furniture",
    "Person",
    "Phrase",
    "Scene",
    "Scenes",
    "Tree",
    "Vehicle",
]

FAMILY_SIZE = 4
SPLITS = {"train": 64_000, "val": 1_000, "test": 1_000, "very_long": 200}
VARIANTS = words.VARIANTS

# --- What there is to choose from. Colours are those that tell apart on this kind of object. ---------------------

TIMES = ("morning", "noon", "sunset", "night")
WEATHERS = ("clear", "cloudy", "rain", "snow", "fog")
ROOFS = ("flat", "pitched", "mansard", "domed", "stepped")
HATS = ("cap", "top hat", "bobble hat")
FACINGS = ("left", "right")

_BRIGHT = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
_CHOICES: dict[str, dict[str, tuple]] = {
    "scene": {"time": TIMES, "weather": WEATHERS},
    "building": {
        "wall": (*_BRIGHT, "white", "brown", "grey"),
        "storeys": (1, 2, 3, 4),
        "roof": ROOFS,
        "roof_colour": ("red", "orange", "green", "blue", "purple", "brown", "black", "grey"),
        "door": (*_BRIGHT, "white", "brown", "black"),
        "awning": (None, "red", "yellow", "green", "blue", "purple", "pink"),
    },
    "vehicle": {
        "kind": ("car", "van", "bus", "truck", "tram", "scooter", "bicycle"),
        "colour": (*_BRIGHT, "white", "black"),
        "facing": FACINGS,
    },
    "person": {
        "coat": (*_BRIGHT, "white", "black", "brown"),
        "hat": (None, *(f"{colour} {hat}" for hat in HATS for colour in (*_BRIGHT, "black", "white"))),
        "umbrella": (None, *_BRIGHT, "white", "black"),
        "dog": (None, "brown", "white", "black", "grey"),
    },
    "tree": {"kind": ("leafy", "pine", "bare", "cherry", "autumn"), "size": ("small", "tall")},
}
_BACK_FURNITURE = (
    *(f"{colour} post box" for colour in ("red", "yellow", "blue", "green")),
    *(f"{colour} phone box" for colour in ("red", "blue", "green")),
    *(f"{colour} bus stop sign" for colour in ("red", "yellow", "blue")),
    "black street lamp",
)
_FRONT_FURNITURE = (
    *(f"{colour} bench" for colour in ("red", "green", "blue", "brown")),
    *(f"{colour} bin" for colour in ("green", "blue", "orange", "grey")),
    *(f"{colour} hydrant" for colour in ("red", "yellow", "blue")),
    "stone fountain",
)
_ABSENT = 0.45  # how often something optional (hat, umbrella, dog, awning) is left out


# --- What a scene is made of -------------------------------------------------------------------------------------


class _Placed:
    """Anything that stands in a scene at ``(x, ground)``: the middle of its foot, in parts of the picture's side."""

    what: ClassVar[str]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Where it is drawn: ``(x0, y0, x1, y1)`` in [0, 1], y downwards."""
        return plan.box_of(self)


@dataclass(frozen=True)
class Building(_Placed):
    """One house of the row; ``awning`` is the colour of its stripes, or None."""

    what: ClassVar[str] = "building"
    x: float
    width: float
    wall: str
    storeys: int
    roof: str
    roof_colour: str
    door: str
    awning: str | None
    ground: float = plan.FOOT_OF_HOUSES


@dataclass(frozen=True)
class Vehicle(_Placed):
    """Something on the road; its lane is its ``ground``."""

    what: ClassVar[str] = "vehicle"
    x: float
    ground: float
    kind: str
    colour: str
    facing: str


@dataclass(frozen=True)
class Person(_Placed):
    """Someone on the near pavement; ``hat`` is a colour and a kind, as in "red cap"; None means without."""

    what: ClassVar[str] = "person"
    x: float
    who: str
    coat: str
    hat: str | None
    umbrella: str | None
    dog: str | None
    ground: float = plan.FRONT_ROW


@dataclass(frozen=True)
class Tree(_Placed):
    """A tree on the far pavement."""

    what: ClassVar[str] = "tree"
    x: float
    kind: str
    size: str
    ground: float = plan.BACK_ROW


@dataclass(frozen=True)
class Furniture(_Placed):
    """Street furniture; ``name`` is a colour (or a material) and a kind, as in "red post box"."""

    what: ClassVar[str] = "furniture"
    x: float
    ground: float
    name: str


Placed = Building | Vehicle | Person | Tree | Furniture


class Content(NamedTuple):
    """All that a scene shows and a description tells, without the way in which it is told."""

    time: str
    weather: str
    objects: tuple[Placed, ...]


class Phrase(NamedTuple):
    """One stretch of a clean caption that describes one placed object: ``caption[start:end] == text``."""

    text: str
    start: int
    end: int
    box: tuple[float, float, float, float]
    object: Placed


@dataclass(frozen=True)
class Scene:
    """One picture and its description; both are made when asked for.

    Attributes:
        id: split and index, as in ``"test-000123"``.
        family: the index of its family; scenes of one family differ in a few details only.
        content: time of day, weather and placed objects.
    """

    id: str
    family: int
    content: Content
    image_size: int = field(repr=False)
    variant: str = field(repr=False)
    detailed: bool = field(repr=False)
    telling: str = field(repr=False)  # seeds the choice of words
    scenery: str = field(repr=False)  # seeds what no description mentions: clouds, lit windows, paving

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
            size: side of the picture in pixels; default the dataset's ``image_size``.

        Returns:
            An RGB image, ``size x size``.

        Raises:
            InputError: ``size`` is below 16.
        """
        size = self.image_size if size is None else size
        _check_image_size(size)
        return drawing.draw(self.content, size, self.scenery)


# --- The dataset -------------------------------------------------------------------------------------------------


class Scenes:
    """A map-style dataset of generated scenes.

    Args:
        split: "train", "val", "test", or "very_long" (descriptions of more than 300 tokens).
        size: how many scenes; default 64,000 / 1,000 / 1,000 / 200. A larger size only adds scenes.
        image_size: side in pixels of the pictures that ``Scene.draw`` makes unless told otherwise.
        seed: another seed, another world.
        variant: what happens to the captions: "clean", "typos", "plain" (lower case, no punctuation), "dropped"
            (a quarter of the statements left out), "repeated" (some said twice) or "reordered".

    Raises:
        InputError: An unknown split or variant, a negative size, an image size below 16.
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
        _check_name("split", split, tuple(SPLITS))
        _check_name("variant", variant, VARIANTS)
        _check_image_size(image_size)
        size = SPLITS[split] if size is None else size
        if size < 0:
            raise InputError(f"expected size >= 0, got {size}; leave it out for the split's own size")
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
        """The scene at ``index``; negative ones count from the end. Raises IndexError past either end."""
        if not -self.size <= index < self.size:
            raise IndexError(f"expected an index in [{-self.size}, {self.size}), got {index}")
        index = int(index) % self.size
        family, member = divmod(index, FAMILY_SIZE)
        key = f"scenes/{self.seed}/{self.split}/{family}"
        return Scene(
            id=f"{self.split}-{index:06d}",
            family=family,
            content=_family(key)[member],
            image_size=self.image_size,
            variant=self.variant,
            detailed=self.split == "very_long",
            telling=f"{key}/{member}",
            scenery=key,
        )


def _check_name(what: str, got: str, known: tuple[str, ...]) -> None:
    if got not in known:
        raise InputError(f"expected {what} to be one of {', '.join(known)}; got {got!r}; choose one of these")


def _check_image_size(size: int) -> None:
    if size < 16:
        raise InputError(f"expected an image size of at least 16 pixels, got {size}; 128 and more show every detail")


# --- Making contents ---------------------------------------------------------------------------------------------


def _family(key: str) -> list[Content]:
    """The contents of one family: ``FAMILY_SIZE`` different scenes, each one or two details from a base."""
    rng = Random(key)
    base = _base(rng)
    members: list[Content] = []
    while len(members) < FAMILY_SIZE:
        member = base
        for _ in range(rng.choice((1, 2))):
            member = _redraw(member, rng)
        if member != base and member not in members:
            members.append(member)
    return members


def _redraw(content: Content, rng: Random) -> Content:
    """The same content with one detail drawn anew, always to another value."""
    place = rng.randrange(-1, len(content.objects))
    if place < 0:
        name = rng.choice(Content._fields[:2])
        return content._replace(**{name: _other(getattr(content, name), _CHOICES["scene"][name], rng)})
    old = content.objects[place]
    while True:
        name, choices = rng.choice(_details(old))
        new = replace(old, **{name: _other(getattr(old, name), choices, rng)})
        if _is_legible(new):
            return content._replace(objects=(*content.objects[:place], new, *content.objects[place + 1 :]))


def _details(placed: Placed) -> list[tuple[str, tuple]]:
    """The details of an object that may be redrawn, each with its choices."""
    if isinstance(placed, Furniture):
        return [("name", _FRONT_FURNITURE if placed.ground == plan.FRONT_ROW else _BACK_FURNITURE)]
    return list(_CHOICES[placed.what].items())


def _other(value, choices: tuple, rng: Random):
    """A choice that is not ``value``; something present may well become absent."""
    if None in choices and value is not None and rng.random() < _ABSENT:
        return None
    return rng.choice([choice for choice in choices if choice != value and choice is not None])


def _is_legible(placed: Placed) -> bool:
    """Whether every named colour stands out from the one it is painted on."""
    if isinstance(placed, Building):
        return placed.wall not in (placed.roof_colour, placed.door)
    return True


def _base(rng: Random) -> Content:
    houses, vehicles, people, trees, back, front = _counts(rng)
    edges = _edges(houses, rng)
    front_slots = rng.sample(plan.FRONT_SLOTS, people + front)
    back_slots = rng.sample(_back_slots(edges), trees + back)
    objects: tuple[Placed, ...] = (
        *(_building(left, right, rng) for left, right in pairwise(edges)),
        *(Vehicle(x, rng.choice(plan.LANES), **_pick("vehicle", rng)) for x in _vehicle_slots(vehicles, rng)),
        *(Person(x, rng.choice(("man", "woman")), **_pick("person", rng)) for x in sorted(front_slots[:people])),
        *(Tree(x, **_pick("tree", rng)) for x in sorted(back_slots[:trees])),
        *(Furniture(x, plan.BACK_ROW, rng.choice(_BACK_FURNITURE)) for x in back_slots[trees:]),
        *(Furniture(x, plan.FRONT_ROW, rng.choice(_FRONT_FURNITURE)) for x in front_slots[people:]),
    )
    return Content(**_pick("scene", rng), objects=objects)


def _counts(rng: Random) -> tuple[int, int, int, int, int, int]:
    """How many houses, vehicles, people, trees, and pieces of furniture behind and in front: 8 to 11 objects.

    Houses and people take twice the words of the others, and a description must not grow too long.
    """
    while True:
        counts = (rng.choice((2, 2, 3, 3, 4)), rng.choice((1, 2)), rng.choice((1, 2, 2, 3)), rng.choice((1, 2)))
        back, front = rng.choice(((1, 0), (0, 1), (1, 1)))
        total = sum(counts) + back + front
        if 8 <= total <= 11 and total + counts[0] + counts[2] <= 16:
            return *counts, back, front


def _edges(houses: int, rng: Random) -> list[float]:
    """Where the houses begin and end, left to right: almost, but not quite, equal widths."""
    inner = [round(number / houses + rng.uniform(-0.015, 0.015), 4) for number in range(1, houses)]
    return [0.0, *inner, 1.0]


def _back_slots(edges: list[float]) -> list[float]:
    """Free places on the far pavement: between the doors, so that none is hidden."""
    corners = [] if len(edges) > 4 else [0.075, 0.925]
    return [*edges[1:-1], *corners]


def _vehicle_slots(vehicles: int, rng: Random) -> list[float]:
    if vehicles == 1:
        return [rng.choice((0.25, 0.5, 0.75))]
    return [0.25, 0.75]


def _building(left: float, right: float, rng: Random) -> Building:
    while True:
        house = Building(round((left + right) / 2, 4), round(right - left, 4), **_pick("building", rng))
        if _is_legible(house):
            return house


def _pick(what: str, rng: Random) -> dict:
    """A value for every detail of this kind of thing."""
    return {name: _first(choices, rng) for name, choices in _CHOICES[what].items()}


def _first(choices: tuple, rng: Random):
    if choices[0] is not None:
        return rng.choice(choices)
    return None if rng.random() < _ABSENT else rng.choice(choices[1:])
